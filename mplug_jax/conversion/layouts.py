"""How an array of a PyTorch state dict lies in our parameter tree, and back.

Each ``Layout`` holds two NumPy functions of (array, heads) that undo each other exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """``load`` turns theirs into ours, ``store`` ours into theirs."""

    load: Callable[[np.ndarray, int], np.ndarray]
    store: Callable[[np.ndarray, int], np.ndarray]


AS_IS = Layout(lambda a, _: a, lambda a, _: a)
# torch.nn.Linear [out, in] <-> Dense [in, out]
LINEAR = Layout(lambda a, _: a.T, lambda a, _: a.T)
# Linear [heads * kv, D] <-> [D, heads, kv], and its bias [heads * kv] <-> [heads, kv]
SPLIT_HEADS = Layout(
    lambda a, heads: a.T.reshape(a.shape[1], heads, -1),
    lambda a, _: a.reshape(a.shape[0], -1).T,
)
SPLIT_HEADS_BIAS = Layout(lambda a, heads: a.reshape(heads, -1), lambda a, _: a.reshape(-1))
# Linear [D, heads * kv] <-> [heads, kv, D]
MERGE_HEADS = Layout(
    lambda a, heads: a.T.reshape(heads, -1, a.shape[0]),
    lambda a, _: a.reshape(-1, a.shape[-1]).T,
)
# Conv2d [out, in, rows, columns] <-> [rows, columns, in, out]
CONVOLUTION = Layout(lambda a, _: a.transpose(2, 3, 1, 0), lambda a, _: a.transpose(3, 2, 0, 1))
# [1, P, D] <-> [P, D], and [1, 1, D] <-> [D]
BATCH_OF_ONE = Layout(lambda a, _: a[0], lambda a, _: a[None])
TOKEN = Layout(lambda a, _: a[0, 0], lambda a, _: a[None, None])

# What a module of a kind holds: (our suffix, their suffix, layout) of each array.
KINDS: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "dense": (("/kernel", ".weight", LINEAR), ("/bias", ".bias", AS_IS)),
    "split": (("/kernel", ".weight", SPLIT_HEADS), ("/bias", ".bias", SPLIT_HEADS_BIAS)),
    # A third of torch.nn.MultiheadAttention's in_proj: query, key and value in one array.
    "packed": (("/kernel", "_weight", SPLIT_HEADS), ("/bias", "_bias", SPLIT_HEADS_BIAS)),
    "merge": (("/kernel", ".weight", MERGE_HEADS), ("/bias", ".bias", AS_IS)),
    "norm": (("/scale", ".weight", AS_IS), ("/bias", ".bias", AS_IS)),
    "table": (("/embedding", ".weight", AS_IS),),
    "patches": (("/kernel", ".weight", CONVOLUTION),),
    "patches_bias": (("/kernel", ".weight", CONVOLUTION), ("/bias", ".bias", AS_IS)),
    "array": (("", "", AS_IS),),
    "weight": (("", ".weight", AS_IS),),
    "batch_of_one": (("", "", BATCH_OF_ONE),),
    "token": (("", "", TOKEN),),
}
