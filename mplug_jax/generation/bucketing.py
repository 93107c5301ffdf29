"""Few array shapes for texts and batches of any size, so that compiled programs are reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def bucket_size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``count``.

    Raises:
      ValueError: none does.
    """
    fitting = [size for size in sizes if size >= count]
    if not fitting:
        raise ValueError(f"{count} fit none of the sizes {sorted(sizes)}; add a larger one.")
    return min(fitting)


def trim_texts(
    ids: np.ndarray, mask: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts padding off ``ids`` and ``mask [B, L]``, to the smallest size that holds the longest.

    Texts are padded on the right; a size beyond L leaves them as they are.
    """
    longest = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1 if mask.any() else 1
    length = min(bucket_size(longest, sizes), ids.shape[1])
    return ids[:, :length], mask[:, :length]


def pad_rows(
    batch: Mapping[str, np.ndarray], sizes: Sequence[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Repeats a batch's last row until it has one of ``sizes`` rows.

    Returns:
      the batch, and ``valid [rows]`` bool, False on the repetitions.

    Raises:
      ValueError: arrays of different lengths, an empty batch, or one larger than every size.
    """
    counts = {name: len(value) for name, value in batch.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"A batch needs as many rows, one or more, in each array; got {counts}.")
    count = next(iter(counts.values()))
    rows = np.minimum(np.arange(bucket_size(count, sizes)), count - 1)
    return {name: value[rows] for name, value in batch.items()}, np.arange(len(rows)) < count
