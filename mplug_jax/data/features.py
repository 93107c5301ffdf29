"""Image features kept on disk, so that a frozen image encoder sees each picture once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mplug_jax.data.records import BadSample, Record, Source


@dataclass
class FeatureSource:
    """A source whose records carry the `features` of their picture beside it.

    Attributes:
      source: the records.
      path: a `.npy` file [N, variants, V, D] float16: tokens of the picture of record i and of its
        augmented variants; a row of NaN stands for a picture that could not be read.
    """

    source: Source
    path: Path
    _array: np.ndarray | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        record = self.source[index]
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        features = self._array[index]
        if np.isnan(features[0, 0, 0]):
            raise BadSample(f"{record['id']}: its picture could not be encoded")
        return {**record, "features": features}

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the file themselves: pickling a memory map would copy all of it.
        return {**self.__dict__, "_array": None}
