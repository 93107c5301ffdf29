"""Rows of several arrays stacked in equal parts, so that rows of one part stay beside each other.

What is split over the devices by rows then keeps on a device whatever belongs to its rows. With one
part, joining is concatenation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def join_parts(arrays: Sequence[jax.Array], parts: int) -> jax.Array:
    """For each part in turn its rows of the first array, then of the second, and so on.

    Args:
      arrays: [N_k, ...]; `parts` divides each N_k.
      parts: their number.

    Returns:
      [sum of N_k, ...].
    """
    pieces = [x.reshape(parts, len(x) // parts, *x.shape[1:]) for x in arrays]
    joined = jnp.concatenate(pieces, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def split_parts(x: jax.Array, sizes: Sequence[int], parts: int) -> list[jax.Array]:
    """The arrays of `sizes` rows that `join_parts` has joined to `x`."""
    pieces = x.reshape(parts, len(x) // parts, *x.shape[1:])
    arrays, start = [], 0
    for size in sizes:
        end = start + size // parts
        arrays.append(pieces[:, start:end].reshape(size, *x.shape[1:]))
        start = end
    return arrays
