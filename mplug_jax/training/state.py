"""TrainState: all that a resumed run needs besides the data iterator."""

from __future__ import annotations

import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.experimental import multihost_utils


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes.

    Attributes:
      step: int32 scalar, updates done so far.
      seed: int32 scalar; every random draw is folded from (seed, purpose, step).
      params: parameters, unboxed.
      opt_state: Optax state.
      momentum_params: EMA of those params that are trained, nested alike, or None; see ``teacher``.
      extra: what the task keeps between steps (ITC queue), or None.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    opt_state: Any
    momentum_params: Any
    extra: Any

    def teacher(self) -> Any:
        """All of the teacher's parameters, or None; those it has no copy of are the student's."""
        if self.momentum_params is None:
            return None
        own = traverse_util.flatten_dict(self.momentum_params)
        return traverse_util.unflatten_dict(traverse_util.flatten_dict(self.params) | own)


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    extra: Any,
    seed: int,
    momentum_params: Any = None,
) -> TrainState:
    """A state at step 0 of unboxed parameters.

    A step donates the state, so ``momentum_params`` must share no memory with ``params``.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        momentum_params=momentum_params,
        extra=extra,
    )


def part_of(tree: Any, part: Any) -> Any:
    """``tree`` limited to the paths that ``part`` has; both are nested dicts."""
    leaves = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {path: leaves[path] for path in traverse_util.flatten_dict(part)}
    )


def path_name(path: tuple[Any, ...]) -> str:
    """'visual_encoder/blocks/mlp/up/kernel' for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def params_sha256(params: Any) -> str:
    """Hash over all parameters, by name, independent of sharding; every process must call it."""
    digest = hashlib.sha256()
    for path, value in sorted(
        ((path_name(p), v) for p, v in jax.tree_util.tree_leaves_with_path(params)),
        key=lambda item: item[0],
    ):
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        array = np.ascontiguousarray(np.asarray(value))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
