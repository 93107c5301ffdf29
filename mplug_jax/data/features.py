"""Image features kept on disk, so that a frozen image encoder sees each picture once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mplug_jax.data.records import BadSample, Record, Source


class Pictures:
    """A view of a source: of the records that share a picture (`image_id`) the first.

    Attributes:
      rows: int [records], the place of each record's picture among the pictures.
    """

    def __init__(self, source: Source):
        self.source = source
        self._first: list[int] = []
        places: dict[Any, int] = {}
        self.rows = np.empty(len(source), np.int64)
        for index in range(len(source)):
            try:
                picture = source[index]["image_id"]
            except BadSample:
                picture = f"bad record {index}"
            if picture not in places:
                places[picture] = len(self._first)
                self._first.append(index)
            self.rows[index] = places[picture]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        return self.source[self._first[index]]


@dataclass
class FeatureSource:
    """A source whose records carry the `features` of their picture beside it.

    Attributes:
      source: the records.
      path: a `.npy` file [pictures, variants, V, D] float16: tokens of a picture and of its
        augmented variants; a row of NaN stands for a picture that could not be read.
      rows: int [records], each record's picture.
    """

    source: Source
    path: Path
    rows: np.ndarray
    _array: np.ndarray | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        record = self.source[index]
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        features = self._array[self.rows[index]]
        if np.isnan(features[0, 0, 0]):
            raise BadSample(f"{record['id']}: its picture could not be encoded")
        return {**record, "features": features}

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the file themselves: pickling a memory map would copy all of it.
        return {**self.__dict__, "_array": None}
