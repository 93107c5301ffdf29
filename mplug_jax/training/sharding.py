"""Mesh, logical axes and placement: the only module that names mesh axes.

Model code annotates parameters with logical axes; ``RULES`` is the one table from there to the
mesh. Under ``data`` alone every parameter is replicated and the batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data",)
BATCH = PartitionSpec("data")

# Logical axis -> mesh axis. None: replicated.
RULES: tuple[tuple[str, str | None], ...] = (
    ("embed", None),
    ("embed_out", None),
    ("mlp", None),
    ("heads", None),
    ("kv", None),
    ("vocab", None),
    ("layers", None),
    ("patch", None),
    ("position", None),
    ("token_type", None),
    ("projection", None),
    ("classes", None),
)


class MeshError(ValueError):
    """The mesh does not fit the devices, or the batch does not fit the mesh."""


def make_mesh(shape: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left.

    Raises:
      MeshError: unknown axis, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise MeshError(f"config.mesh has no axis {unknown[0]!r}; axes are: {', '.join(AXES)}.")
    sizes = [shape.get(axis, 1) for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise MeshError(
            f"config.mesh={dict(shape)} does not match the {len(devices)} devices of this run: the "
            "product of the axes must be that number (-1 takes what is left)."
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raises MeshError unless every device gets the same number of rows in each micro-batch."""
    parts = mesh.shape["data"] * accumulate
    if batch_size % parts:
        fitting = max(batch_size // parts, 1) * parts
        raise MeshError(
            f"config.batch_size={batch_size} does not divide over {mesh.shape['data']} devices on "
            f"mesh axis 'data' with config.accumulate={accumulate}; use a multiple of {parts}, "
            f"such as {fitting}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of a value every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of an array split along its first axis."""
    return NamedSharding(mesh, BATCH)


def state_shardings(abstract_state: Any, boxed_params: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of the state.

    Parameters follow ``RULES``; optimizer and momentum leaves follow the parameter whose path
    ends theirs and whose shape they share; all else is replicated.
    """
    specs = nn.get_partition_spec(boxed_params)
    params = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    by_path = {
        tuple(map(str, path)): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, NamedSharding)
        )
    }
    shapes = {
        tuple(map(str, path)): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed_params))
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(map(str, path))
        for start in range(len(keys)):
            name = keys[start:]
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def abstract_batch(example: Mapping[str, Any], batch_size: int, mesh: Mesh) -> dict[str, Any]:
    """Shapes and placement of a global batch of examples shaped like this one."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype, sharding=sharding)
        for name, value in example.items()
    }


def place_local_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins each process's rows into global arrays split over ``data``."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def place_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits arrays that every process holds whole."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, sharding, lambda index, v=value: v[index])
        for name, value in batch.items()
    }


def split_micro_batches(batch: Any, count: int) -> Any:
    """``[B, ...]`` to ``[count, B / count, ...]`` without moving a row to another device."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, "data"))

    return jax.tree.map(split, batch)
