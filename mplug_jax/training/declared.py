"""Sizes that files of weights declare, against what they hold, before memory is taken for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from mplug_jax.training.integrity import CheckpointError
from mplug_jax.training.state import path_name

# Weights are packed to about 0.9 of their size, and zeros to a thousandth. No file of them is
# packed so well as a whole, but for small ones, which cost nothing.
MOST_PACKED = 64
SMALL = 2**30


def implausible(declared: int, held: int) -> bool:
    """Whether ``declared`` bytes of tensors cannot be what ``held`` bytes on a disk hold."""
    return declared > SMALL and declared > MOST_PACKED * held


def declared_shapes(folder: Path, metadata: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a checkpoint's parameters, which its files can hold.

    What is missing of a saved array is read as zeros, so that a shape alone would take memory.

    Args:
      metadata: a tree of what has a ``shape``.

    Raises:
      CheckpointError: the files cannot hold so much.
    """
    leaves = jax.tree_util.tree_leaves_with_path(metadata)
    shapes = {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
    declared = 4 * sum(map(math.prod, shapes.values()))
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if implausible(declared, held):
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        raise CheckpointError(
            f"{folder} declares {declared:,} bytes of parameters and has {held:,} on the disk: it "
            f"is damaged, or nothing that this program wrote. The largest is {largest}, "
            f"{shapes[largest]}."
        )
    return shapes
