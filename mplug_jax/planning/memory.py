"""Bytes on one device, from shapes alone.

The state follows from its shardings, exactly. For what comes and goes in a step (activations,
gradients), the program of one device's rows is traced and walked (``liveness``), with

- gradients as large as the shard of their parameter;
- values with an axis of ``heads``, ``mlp_dim`` or the vocabulary divided by the ``tensor`` axis;
- ITC's similarities, whose rows are the whole batch's, multiplied;
- the pictures that hard negatives gather, added;
- ``PACKING`` on top: XLA's heap has holes, and its order of operations is not the program's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.planning.collectives import gathered_pictures, pool_devices
from mplug_jax.planning.liveness import Usage, bytes_of, usage
from mplug_jax.planning.program import Program, build_program, trace
from mplug_jax.training.optimizer import policies
from mplug_jax.training.sharding import batch_parts, data_mesh

# What compiled programs of small models needed over the walk's account. It was chosen on the very
# programs that tests/planning compares, so their agreement is a fit and no prediction.
PACKING = 1.2


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      params, optimizer, teacher, queue, batch: what the step is given.
      gradients: of all trained parameters; they are part of ``temporaries``.
      temporaries: what the step needs besides, at its peak.
      traffic: bytes that a step reads and writes.
    """

    params: float
    optimizer: float
    teacher: float
    queue: float
    batch: float
    gradients: float
    temporaries: float
    traffic: float

    @property
    def state(self) -> float:
        """What lies there between two steps."""
        return self.params + self.optimizer + self.teacher + self.queue

    @property
    def total(self) -> float:
        """All of it at the peak."""
        return self.state + self.batch + self.temporaries


def forecast_memory(config: ConfigDict, program: Program) -> Memory:
    """The bytes of a program, without compiling it."""
    state = program.state
    trained = jax.tree.map(
        lambda leaf, policy: None if policy.freeze else leaf,
        state.params,
        policies(state.params, config.optimizer.to_dict()),
    )
    gradients = shard_bytes(trained)
    used = device_usage(config, program)
    queue = shard_bytes(state.extra)
    params, optimizer = shard_bytes(state.params), shard_bytes(state.opt_state)
    teacher = shard_bytes(state.momentum_params)
    # At its end every gradient exists, however little the passes need before.
    peak = max(used.peak, gradients)
    return Memory(
        params,
        optimizer,
        teacher,
        queue,
        shard_bytes(program.batch),
        gradients,
        PACKING * (peak + gathered_on_device(config, program)),
        used.traffic + 2 * (params + optimizer + teacher),
    )


def shard_bytes(tree: Any) -> float:
    """Bytes of the part of a tree that lies on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def device_usage(config: ConfigDict, program: Program, *, on_cpu: bool = False) -> Usage:
    """What the walk finds for one device.

    ``on_cpu``: of the program as XLA compiles it for the CPU, which widens bfloat16 to float32 and
    keeps what layers outside of a loop were told to recompute.
    """
    parts = batch_parts(program.mesh)
    local = build_program(_share(config, parts), data_mesh(jax.devices()[:1]))
    itemsize = _widened if on_cpu else bytes_of
    return usage(trace(local), _size_of(config, program, itemsize), merged=on_cpu)


def _widened(aval: Any) -> int:
    return bytes_of(aval) * (2 if getattr(aval, "dtype", None) == jnp.bfloat16 else 1)


def _share(config: ConfigDict, parts: int) -> ConfigDict:
    """The config of one device's rows and its part of the queue."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size //= parts
        config.objectives.itm.pool = 0
        queue = config.objectives.itc.queue_size
        config.objectives.itc.queue_size = max(queue // parts, 1) if queue else 0
    return config


def _size_of(
    config: ConfigDict, program: Program, itemsize: Callable[[Any], float]
) -> Callable[[Any], float]:
    parts, mesh = batch_parts(program.mesh), program.mesh
    tensor = mesh.size // parts
    shards = {
        leaf.shape: math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(leaf.size, 1)
        for leaf in jax.tree.leaves(program.state.params)
        if leaf.ndim > 1
    }
    model = program.model_config
    split = {model.text.mlp_dim, model.vision.mlp_dim, model.text.vocab_size}
    split |= {model.text.heads, model.vision.heads}
    divided = {size for size in split if size % tensor == 0}
    rows = config.batch_size // parts // config.accumulate
    queue = max(config.objectives.itc.queue_size // parts, 1)
    compared = {(rows, rows + queue), (rows, rows)}

    def size_of(aval: Any) -> float:
        shape = getattr(aval, "shape", ())
        size = itemsize(aval)
        if shape in shards:
            return size * shards[shape]
        if rows > 1 and shape in compared:
            return size * parts / tensor
        return size / tensor if tensor > 1 and divided.intersection(shape[1:]) else size

    return size_of


def gathered_on_device(config: ConfigDict, program: Program) -> float:
    """Pictures of other devices, which exist where rows are split at all."""
    parts = batch_parts(program.mesh)
    others = 1 - 1 / pool_devices(config, parts)
    return gathered_pictures(config, parts) * parts / program.mesh.size * others


def with_rows(config: ConfigDict, mesh: Mesh, rows: int) -> ConfigDict:
    """The config with so many rows a device and micro-batch, and pools on as many devices."""
    config = config.copy_and_resolve_references()
    parts = batch_parts(mesh)
    with config.unlocked():
        config.objectives.itm.pool = max(rows * pool_devices(config, parts), 2)
        config.batch_size = rows * config.accumulate * parts
    return config


def largest_rows(config: ConfigDict, mesh: Mesh, capacity: float, known: Memory) -> int:
    """The most rows a device and micro-batch that fit ``capacity`` bytes; 0: not one.

    All but a constant grows with the rows: a line through the memory at two sizes says where it
    crosses.
    """
    rows = config.batch_size // batch_parts(mesh) // config.accumulate
    other = rows // 2 if rows > 3 else 2 * rows  # a pool needs two
    changed = with_rows(config, mesh, other)
    second = forecast_memory(changed, build_program(changed, mesh))
    slope = (known.total - second.total) / (rows - other)
    return max(int(rows + (capacity - known.total) // slope), 0)
