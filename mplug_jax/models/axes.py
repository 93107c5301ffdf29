"""Logical axes of activations: where an array may be split, said without a mesh.

What the names mean on the devices at hand is the business of whoever traces the model: they are
looked up in ``axis_rules`` and ``jax.set_mesh``, and mean nothing outside.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AbstractMesh, PartitionSpec

Rule = str | tuple[str, ...] | None

# Not flax.linen.logical_axis_rules: Flax then constrains every freshly initialised parameter too,
# and fails at DenseGeneral, which initialises in another shape.
_rules: contextvars.ContextVar[Mapping[str, Rule] | None] = contextvars.ContextVar(
    "rules", default=None
)


@contextlib.contextmanager
def axis_rules(rules: Mapping[str, Rule]) -> Iterator[None]:
    """Inside, the named logical axes are split over these axes of ``jax.set_mesh``'s mesh."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def mesh_axes(rule: Rule) -> tuple[str, ...]:
    """The mesh axes of a rule, however it is written."""
    return (rule,) if isinstance(rule, str) else rule or ()


def _split_over(mesh: AbstractMesh, axis: str | None) -> tuple[str, ...]:
    axes = mesh_axes((_rules.get() or {}).get(axis))
    return tuple(name for name in axes if mesh.shape.get(name, 1) > 1)


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def shards(axis: str) -> int:
    """The number of parts that arrays are cut into along a logical axis; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return _parts(mesh, _split_over(mesh, axis))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x``, laid out over the devices as its logical axes say.

    The values do not change. Where the devices do not divide a dimension, and on one device, the
    compiler decides.

    Args:
      axes: one name a dimension; None: not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = [_split_over(mesh, axis) for axis in axes]
    if not any(found):
        return x
    split = [
        names if size % _parts(mesh, names) == 0 else PartitionSpec.UNCONSTRAINED
        for size, names in zip(x.shape, found, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*split))


def constrain_rows(x: jax.Array) -> jax.Array:
    """``x [N, ...]`` split along its rows, as a batch is."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))
