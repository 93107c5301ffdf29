"""TrainState: all that a resumed run needs besides the data iterator."""

from __future__ import annotations

import hashlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes.

    Attributes:
      step: int32 scalar, updates done so far.
      seed: int32 scalar; every random draw is folded from (seed, purpose, step).
      params: parameters, unboxed.
      opt_state: Optax state.
      momentum_params: EMA copy of params (the teacher), or None.
      extra: what the task keeps between steps (ITC queue), or None.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    opt_state: Any
    momentum_params: Any
    extra: Any


def create_state(
    boxed_params: Any,
    optimizer: optax.GradientTransformation,
    extra: Any,
    seed: int,
    momentum: bool,
) -> TrainState:
    """A state at step 0; the teacher starts as a copy of the parameters."""
    params = nn.meta.unbox(boxed_params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        momentum_params=jax.tree.map(jnp.copy, params) if momentum else None,
        extra=extra,
    )


def path_name(path: tuple[Any, ...]) -> str:
    """'visual_encoder/blocks/mlp/up/kernel' for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def params_sha256(params: Any) -> str:
    """Hash over all parameters, by name, independent of sharding."""
    digest = hashlib.sha256()
    for path, value in sorted(
        ((path_name(p), v) for p, v in jax.tree_util.tree_leaves_with_path(params)),
        key=lambda item: item[0],
    ):
        array = np.ascontiguousarray(np.asarray(value))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
