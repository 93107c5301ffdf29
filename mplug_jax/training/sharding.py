"""Mesh, logical axes and placement: the only module that names mesh axes.

- ``data``: rows of the batch are split, parameters are held whole.
- ``fsdp``: rows of the batch are split as well, and so are parameters, gradients, optimizer and
  teacher, which a layer gathers when it is its turn (ZeRO-3, Rajbhandari et al. 2020).
- ``tensor``: heads, MLPs and vocabulary are split (Shoeybi et al. 2019, "Megatron-LM").

Model code names logical axes; ``RULES`` is the one table from there to the mesh.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mplug_jax.models.axes import Rule, axis_rules, mesh_axes
from mplug_jax.training.state import path_name

HOST = "pinned_host"
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)

# Logical axis -> mesh axes. None: not split.
RULES: dict[str, Rule] = {
    # Of parameters; activations have 'heads', 'mlp' and 'vocab' too, and never split 'embed'.
    "embed": "fsdp",
    "embed_out": None,
    "mlp": "tensor",
    "heads": "tensor",
    "kv": None,
    "vocab": "tensor",
    "layers": None,
    "patch": None,
    "position": None,
    "token_type": None,
    "projection": None,
    "classes": None,
    # Of activations: rows; of the contrast: the bank (batch and queue), and who is compared to it.
    "batch": ROWS,
    "bank": ROWS,
    "queries": "tensor",
}
# Sizes that the published models fix and many meshes do not divide: 12 heads, 30,522 words. There
# the mesh axis splits the parameter's `embed` axis further instead.
MOVED_TO_EMBED = ("heads", "vocab")


class MeshError(ValueError):
    """The mesh does not fit the devices, or batch or parameters do not fit the mesh."""


def make_mesh(shape: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left, others are 1 if missing.

    Raises:
      MeshError: unknown axis, a product that is not the number of devices, or a tensor axis that
        crosses processes, which read different rows.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise MeshError(f"config.mesh has no axis {unknown[0]!r}; axes are: {', '.join(AXES)}.")
    sizes = [shape.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise MeshError(
            f"config.mesh={dict(shape)} does not match the {len(devices)} devices of this run: the "
            "product of the axes must be that number (-1 takes what is left)."
        )
    grid = np.asarray(devices).reshape(sizes)
    if any(
        len({device.process_index for device in group}) > 1 for group in grid.reshape(-1, sizes[-1])
    ):
        raise MeshError(
            f"config.mesh.tensor={sizes[-1]} spreads the same rows of a batch over several "
            "processes, and each process reads rows of its own: the axis must divide the number of "
            "devices of a process."
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_mesh(devices: list[Any]) -> Mesh:
    """A mesh of these devices that each hold everything and share the rows."""
    return make_mesh({"data": len(devices)}, devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, what is traced knows the mesh and what logical axes mean on it."""
    with jax.set_mesh(mesh), axis_rules(RULES):
        yield


def jit_on(mesh: Mesh, function: Callable[..., Any], out_shardings: Any) -> Callable[..., Any]:
    """``function`` compiled for a mesh."""
    compiled = jax.jit(function, out_shardings=out_shardings)

    def call(*args: Any) -> Any:
        with on_mesh(mesh):
            return compiled(*args)

    return call


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raises MeshError unless every device gets the same number of rows in each micro-batch."""
    parts = batch_parts(mesh) * accumulate
    if batch_size % parts:
        fitting = max(batch_size // parts, 1) * parts
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in ROWS)
        raise MeshError(
            f"config.batch_size={batch_size} does not divide over the {batch_parts(mesh)} parts of "
            f"the mesh axes {axes} with config.accumulate={accumulate}; use a multiple of {parts}, "
            f"such as {fitting}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of a value every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of an array split along its first axis."""
    return NamedSharding(mesh, BATCH)


def parameter_spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh
) -> PartitionSpec:
    """Where a parameter is split, by ``RULES``.

    Where the mesh does not divide a dimension: heads and vocabulary are held whole, and their mesh
    axis splits the `embed` axis of the same parameter further, if it has one. Vectors (biases,
    scales, one a layer where layers are stacked) are held whole. A matrix is an error.

    Args:
      name: path of the parameter, for the message.
      axes: logical axes of the dimensions.

    Raises:
      MeshError: a logical axis without a rule, two dimensions over one mesh axis, or a dimension
        that the mesh does not divide.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise MeshError(
            f"{name}: its logical axis {unknown[0]!r} has no rule; add one to RULES in "
            f"mplug_jax/training/sharding.py. Axes with a rule: {', '.join(RULES)}."
        )
    split = [mesh_axes(RULES[axis] if axis else None) for axis in axes]
    _check_collisions(name, axes, split)
    for place, axis in enumerate(axes):
        if axis in MOVED_TO_EMBED and shape[place] % _product(mesh, split[place]):
            if "embed" in axes:
                split[axes.index("embed")] += split[place]
            split[place] = ()
    vector = sum(axis != "layers" for axis in axes) == 1
    for place, axis in enumerate(axes):
        if shape[place] % _product(mesh, split[place]):
            if not vector:
                raise _indivisible(name, shape[place], axis, split[place], mesh)
            split[place] = ()
    return PartitionSpec(*(names or None for names in split))


def _product(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _check_collisions(
    name: str, axes: Sequence[str | None], split: Sequence[Sequence[str]]
) -> None:
    owners: dict[str, str] = {}
    for axis, names in zip(axes, split, strict=True):
        for mesh_axis in names:
            if mesh_axis in owners:
                raise MeshError(
                    f"{name}: its logical axes {owners[mesh_axis]!r} and {axis!r} are both split "
                    f"over mesh axis {mesh_axis!r}, which can split one of them; give one another "
                    "rule in RULES of mplug_jax/training/sharding.py."
                )
            owners[mesh_axis] = str(axis)


def _indivisible(
    name: str, size: int, axis: str | None, names: Sequence[str], mesh: Mesh
) -> MeshError:
    parts = _product(mesh, names)
    given = " x ".join(f"config.mesh.{n}={mesh.shape[n]}" for n in names if mesh.shape[n] > 1)
    fitting = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
    higher = -(-size // parts) * parts
    return MeshError(
        f"{name}: {given} does not divide its axis {axis!r} of {size}. Make the product of these "
        f"mesh axes one of {', '.join(fitting)}, or the size a multiple of {parts}, such as "
        f"{higher}."
    )


def state_shardings(abstract_state: Any, boxed_params: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of the state.

    Parameters follow ``parameter_spec``; optimizer and momentum leaves follow the parameter whose
    path ends theirs and whose shape they share. What a task keeps (``extra``) consists of rows and
    is split like the bank of the contrast, along the first axis that the mesh divides. All else is
    replicated.

    Raises:
      MeshError: as ``parameter_spec``; nothing has been compiled by then.
    """
    by_path, shapes = {}, {}
    boxes = jax.tree_util.tree_leaves_with_path(
        boxed_params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    for path, box in boxes:
        keys, leaf = tuple(map(str, path)), nn.meta.unbox(box)
        axes = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shapes[keys] = leaf.shape
        by_path[keys] = NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, axes, mesh))

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(map(str, path))
        if keys[0] == ".extra":
            return NamedSharding(mesh, _rows_spec(leaf.shape, mesh))
        for start in range(len(keys)):
            name = keys[start:]
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def offloaded(shardings: Any) -> Any:
    """The shardings of a state whose optimizer moments lie in the host's memory.

    Raises:
      MeshError: devices that cannot read it.
    """
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise MeshError(
            f"config.optimizer.offload: a {device.platform} device has no {HOST} memory, only "
            f"{', '.join(kinds)}; set it to False."
        )
    moments = jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings.opt_state)
    return shardings.replace(opt_state=moments)


def _rows_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    names = mesh_axes(RULES["bank"])
    for place, size in enumerate(shape):
        if size % _product(mesh, names) == 0:
            return PartitionSpec(*(None,) * place, names)
    return PartitionSpec()


def abstract_batch(example: Mapping[str, Any], batch_size: int, mesh: Mesh) -> dict[str, Any]:
    """Shapes and placement of a global batch of examples shaped like this one."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype, sharding=sharding)
        for name, value in example.items()
    }


def place_local_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins each process's rows into global arrays split over the mesh."""
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
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ROWS))

    return jax.tree.map(split, batch)
