"""Starting a model from the parameters of another that is not quite of its shape.

Fine-tuning takes larger pictures (the position embeddings are resampled), new tokens (coordinates
of grounding), new heads (classifiers) and clips (positions of frames, which begin at zero).
Everything else must fit name by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.models.vit import resize_positions

POSITIONS = "visual_encoder/position_embedding"
FRAMES = "frame_positions"
# One row a token: an embedding table, or the bias of a vocabulary head.
VOCABULARY = r"/word/embedding$|^(mlm_head|decoder/head)/bias$"

Shape = tuple[int, ...]


class Plan(NamedTuple):
    """What becomes of each parameter.

    Attributes:
      same: names whose arrays are taken as they are.
      resized: position embeddings, of patches or frames, that are resampled.
      grown: vocabularies that gain rows, which stay as initialised.
      fresh: parameters the checkpoint lacks and may lack.
      unused: parameters of the checkpoint that this model has no use for, and may leave.
      problems: a line for each difference that nothing above explains.
    """

    same: list[str]
    resized: list[str]
    grown: list[str]
    fresh: list[str]
    unused: list[str]
    problems: list[str]

    def describe(self) -> str:
        """What was done to parameters that were not simply taken, one line a kind, or ''."""
        parts = {
            "positions resampled": self.resized,
            "vocabulary grown": self.grown,
            "at init": self.fresh,
            "not taken": self.unused,
        }
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in parts.items() if names)


def plan(saved: Mapping[str, Shape], wanted: Mapping[str, Shape], optional: Sequence[str]) -> Plan:
    """Compares two models by the names and shapes of their parameters.

    Args:
      saved, wanted: shapes by name ('visual_encoder/position_embedding').
      optional: patterns (``re.search``) of parameters that either side may lack: task heads.
    """

    def is_optional(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in optional)

    result = Plan([], [], [], [], [], [])
    for name in sorted(saved.keys() - wanted.keys()):
        if is_optional(name):
            result.unused.append(name)
        else:
            result.problems.append(f"  only in the checkpoint: {name}")
    for name in sorted(wanted.keys() - saved.keys()):
        if is_optional(name) or name == FRAMES:
            result.fresh.append(name)
        else:
            result.problems.append(f"  only in the model: {name}")
    for name in sorted(wanted.keys() & saved.keys()):
        old, new = saved[name], wanted[name]
        if old == new:
            result.same.append(name)
        elif name in (POSITIONS, FRAMES) and old[1:] == new[1:]:
            result.resized.append(name)
        elif re.search(VOCABULARY, name) and old[1:] == new[1:] and old[0] < new[0]:
            result.grown.append(name)
        elif is_optional(name):
            result.fresh.append(name)
        else:
            result.problems.append(f"  {name}: {old} in the checkpoint, {new} in the model")
    return result


def square_grid(tokens: int) -> tuple[int, int]:
    """The patch grid of ``1 + P`` position embeddings whose model is not known.

    Raises:
      ValueError: P is no square.
    """
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(f"{tokens - 1} position embeddings are no square grid.")
    return side, side


def resized(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Position embeddings ``[1 + P, D]`` for another patch grid; see ``resize_positions``."""
    return resize_positions(jnp.asarray(table), old, new)


def resized_frames(table: jax.Array, frames: int) -> jax.Array:
    """Positions of frames ``[T, D]`` for clips of another number of them, linearly in between."""
    shape = (frames, table.shape[1])
    return jax.image.resize(jnp.asarray(table), shape, "linear", antialias=False)


def grown(table: Any, initial: jax.Array) -> jax.Array:
    """``initial [V, ...]`` with its first rows replaced by ``table [V' < V, ...]``."""
    return initial.at[: len(table)].set(jnp.asarray(table, initial.dtype))
