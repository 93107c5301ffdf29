"""WebDataset tars, as img2dataset leaves CC3M, CC12M, SBU and the like, by random access."""

import itertools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mplug_jax.data.records import Record
from mplug_jax.data.sources.file_records import check_bad, rooted
from mplug_jax.data.sources.shards import find_shards
from mplug_jax.data.sources.tar_index import TarIndex, tar_index

logger = logging.getLogger(__name__)

# Tars whose headers are read at a time; this waits for disks and networks above all.
READERS = 8


class TarRecords:
    """Records of tars; picture and caption are read from the tar each time.

    It holds neither captions nor open files, only where the indexes lie.

    Attributes:
      cut: where and why tars ended too early.
      bad_records: (where, reason) of samples left out, the first of each tar.
    """

    def __init__(self, indexes: Sequence[TarIndex]):
        self._indexes = list(indexes)
        self._ends = np.cumsum([index.count for index in indexes])
        paths = [index.shard.rpartition("://")[2] for index in indexes]
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        # What tells the tars apart is enough for the records' names.
        self._names = [os.path.relpath(path, shared) for path in paths]
        self.cut = [index.cut for index in indexes if index.cut is not None]
        self.bad_records = list(itertools.chain(*(index.bad_samples for index in indexes)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"TarRecords({len(self)} records in {len(self._indexes)} tars)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where the tar cannot be read; SourceError where its index is gone."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        number = int(index) - int(self._ends[shard] - self._indexes[shard].count)
        key, image, caption = self._indexes[shard].sample(number)
        return {
            "id": f"{self._names[shard]}/{key}",
            "image": image,
            "image_id": int(index),
            "captions": [caption],
        }


def tar_records(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> TarRecords:
    """The samples of WebDataset tars that have a picture and a caption.

    The files of a sample share their name up to the first dot: `.jpg`, `.jpeg`, `.png` or `.webp`
    is the picture, `.txt` the caption or, without it, "caption" in `.json`. The first time, the
    headers of every tar are read and kept (`tar_index`); of a tar that was cut off, as far as it
    goes.

    Args:
      path: a folder of .tar files, a pattern, or one file; a path or URL, joined with `root` where
        relative.
      root: config.data.root.
      max_bad_fraction: samples without picture or caption tolerated among all.

    Raises:
      SourceError: there are no tars, one is none or cannot be read, no samples, too many bad ones.
    """
    shards = find_shards(path, root, (".tar",))
    logger.info("%s: looking for the indexes of %d tars", path, len(shards))
    with ThreadPoolExecutor(READERS, thread_name_prefix="tar-index") as pool:
        indexes = list(pool.map(tar_index, shards))
    records = TarRecords(indexes)
    for reason in records.cut:
        logger.warning("%s; the samples before are used", reason)
    bad = sum(index.bad for index in indexes)
    check_bad(rooted(path, root), len(records), records.bad_records, max_bad_fraction, bad)
    return records
