"""The momentum model: its moving average, and the ramp of the weight its targets get."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Params = TypeVar("Params")


def ema(momentum_params: Params, params: Params, decay: jax.Array | float) -> Params:
    """decay * momentum + (1 - decay) * params, leaf by leaf, in the momentum's dtypes.

    Raises:
      ValueError: if the two trees differ in structure.
    """

    def average(momentum: jax.Array, online: jax.Array) -> jax.Array:
        return (momentum * decay + online * (1.0 - decay)).astype(momentum.dtype)

    return jax.tree.map(average, momentum_params, params)


def alpha_ramp(step: jax.Array | int, alpha: float, ramp_steps: int) -> jax.Array:
    """Distillation weight at a step: linear from 0 to `alpha` over `ramp_steps`, then constant.

    The official ramp lasts the first epoch. `ramp_steps` 0 means `alpha` from the start.

    Raises:
      ValueError: for a negative `ramp_steps`.
    """
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps must not be negative, got {ramp_steps}")
    if ramp_steps == 0:
        return jnp.asarray(alpha, jnp.float32)
    return alpha * jnp.minimum(jnp.asarray(step, jnp.float32) / ramp_steps, 1.0)
