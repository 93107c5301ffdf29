"""What the devices send each other in a step, by formulas.

Bytes are those that a device sends over its slowest link when the group is a ring of n (Thakur et
al. 2005), S the bytes of the whole value:

- all-reduce: ``2 (n-1)/n S``; all-gather and reduce-scatter: ``(n-1)/n S``;
- all-to-all: ``(n-1)/n S``, S what a device holds; collective-permute: ``S``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from mplug_jax.models.fusion import layer_kinds
from mplug_jax.planning.program import Program
from mplug_jax.training.optimizer import policies
from mplug_jax.training.sharding import ROWS, batch_parts
from mplug_jax.training.state import path_name
from mplug_jax.validation import PRETRAINING

TIED = "embeddings/word/embedding"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      name: what is exchanged; kind: as HLO names it.
      group: n, devices that take part; stride: distance of neighbours among the devices.
      size: S in bytes; times: in a step.
    """

    name: str
    kind: str
    group: int
    stride: int
    size: float
    times: float = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step."""
        if self.group < 2:
            return 0.0
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.size * self.times


def formula_collectives(config: ConfigDict, program: Program) -> list[Collective]:
    """The exchanges of a step: gradients, parameters, and for pre-training the batch's own."""
    found = _of_parameters(config, program)
    if config.task in PRETRAINING:
        found += _of_contrast(config, program) + _of_pairs(config, program)
        found += _of_blocks(config, program)
    return [c for c in found if c.sent > 0]


def _axes(mesh: Any) -> tuple[int, int, int]:
    """Sizes of the axes that split rows alone, rows and parameters, and layers' widths."""
    data, fsdp = (mesh.shape[axis] for axis in ROWS)
    return data, fsdp, mesh.size // (data * fsdp)


def _of_parameters(config: ConfigDict, program: Program) -> list[Collective]:
    """Gradients and, where parameters are split, the gathering of them.

    A gradient is reduced over the rows: scattered over ``fsdp`` where its parameter is split there,
    then all-reduced over ``data``. A split parameter is gathered for the forward and again for the
    backward pass, the teacher's for its forward pass; in float32. Every micro-batch does all of it.
    Word embeddings are read by the head as well, and both their gradients are reduced.
    """
    data, fsdp, tensor = _axes(program.mesh)
    params = program.state.params
    policy = jax.tree.leaves(policies(params, config.optimizer.to_dict()))
    scattered = whole = shards = gathered = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), rule in zip(leaves, policy, strict=True):
        names = [n for part in leaf.sharding.spec for n in _names(part)]
        split = ROWS[1] in names
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        full = shard * (fsdp if split else 1)
        gathered += full if split else 0.0
        if not rule.freeze:
            sums = 2 if path_name(path).endswith(TIED) else 1
            shards += sums * shard
            scattered += sums * full if split else 0.0
            whole += 0.0 if split else sums * full
    passes = 2 + (program.state.momentum_params is not None)
    inner, outer, often = tensor, tensor * fsdp, config.accumulate
    return [
        Collective("gradients", "reduce-scatter", fsdp, inner, scattered, often),
        Collective("gradients of parameters held whole", "all-reduce", fsdp, inner, whole, often),
        Collective("gradients", "all-reduce", data, outer, shards, often),
        Collective("parameters", "all-gather", fsdp, inner, gathered, passes * often),
    ]


def _names(part: Any) -> tuple[str, ...]:
    return part if isinstance(part, tuple) else (part,) if part else ()


def _of_contrast(config: ConfigDict, program: Program) -> list[Collective]:
    """ITC: the queries travel, the bank stays.

    Features of both sides, online and the teacher's, are gathered once, the teacher's once more for
    the queue; their gradients are all-reduced; the batch's similarities change from columns to
    rows.
    """
    if not config.objectives.itc.weight:
        return []
    tensor = _axes(program.mesh)[2]
    parts = batch_parts(program.mesh)
    micro = config.batch_size // config.accumulate
    feats = micro * config.model.embed_dim * 4.0
    taught = program.state.momentum_params is not None
    often = config.accumulate
    return [
        Collective("ITC features", "all-gather", parts, tensor, feats, (2 + 2 * taught) * often),
        Collective("ITC gradients", "all-reduce", parts, tensor, feats, 2 * often),
        Collective(
            "ITC similarities", "all-to-all", parts, tensor, 4.0 * micro**2 / parts, 2 * often
        ),
        Collective(
            "queue",
            "all-gather",
            parts,
            tensor,
            feats,
            2 * often * (program.state.extra is not None),
        ),
    ]


def pool_devices(config: ConfigDict, parts: int) -> int:
    """Devices along the rows' axes, of ``parts``, over which a pool of ITM's negatives lies.

    1: the pairs of a device are made of its own rows alone, for all pairs are stacked by pools.
    """
    micro = config.batch_size // config.accumulate
    pools = micro // min(config.objectives.itm.pool or micro, micro)
    return parts // math.gcd(pools, parts)


def gathered_pictures(config: ConfigDict, parts: int) -> float:
    """Bytes of the keys and values that hard negatives have every device hold.

    A negative may lie on any device of the pool, so each cross layer before the first connected one
    gathers keys and values ``[B, V, D]`` of all its pictures, and what follows it the tokens.
    """
    devices = pool_devices(config, parts)
    if config.task not in PRETRAINING or devices == 1:
        return 0.0
    pictures = config.batch_size // config.accumulate * devices / parts
    return (2 * _sharing_layers(config) + 1) * pictures * _tokens(config) * _width(config)


def _of_pairs(config: ConfigDict, program: Program) -> list[Collective]:
    """Pictures and texts of the pairs that fusion reads, forward, again if rematerialised, and as
    sums backward; the texts are those of ITM, MLM and prefix LM."""
    tensor = _axes(program.mesh)[2]
    parts = batch_parts(program.mesh)
    devices = pool_devices(config, parts)
    taught = program.state.momentum_params is not None
    repeated = config.model.remat != "none"
    often, size = config.accumulate, gathered_pictures(config, parts) / tensor
    kinds = 1 + sum(config.objectives[n].weight > 0 for n in ("mlm", "prefix"))
    rows = config.batch_size // config.accumulate * devices / parts
    texts = kinds * rows * config.data.text_length * _width(config)

    def exchange(name: str, kind: str, size: float, times: float = 1) -> Collective:
        return Collective(name, kind, devices, tensor, size, times * often)

    return [
        exchange("pictures of pairs", "all-gather", size, 1 + repeated + taught),
        exchange("pictures of pairs, gradients", "all-reduce", size),
        exchange("texts of pairs", "all-gather", texts),
        exchange("texts of pairs, gradients", "all-reduce", texts),
        exchange("teacher's texts of pairs", "all-reduce", texts * (kinds - 1) / kinds, taught),
    ]


def _of_blocks(config: ConfigDict, program: Program) -> list[Collective]:
    """Sums over ``tensor`` around the blocks (Shoeybi et al. 2019).

    Forward one sum a sub-layer; backward one for an MLP, one each for queries, keys and values; a
    rematerialised block sums forward twice, a teacher's forward alone.
    """
    tensor = _axes(program.mesh)[2]
    rows = config.batch_size / batch_parts(program.mesh)
    model, texts = config.model, config.data.text_length
    item = 2 if model.dtype == "bfloat16" else 4
    kept = sum(config.objectives[n].weight > 0 for n in ("mlm", "prefix"))
    pairs = (3 if config.objectives.itm.weight else 0) + kept
    pictures = _tokens(config)
    forward = 2 * model.vision.depth * pictures * model.vision.width
    backward = 2 * forward
    width = model.text.width
    blocks = [(model.text.depth, (1 + kept) * texts, 0)]
    for kind in layer_kinds(model.fusion.schedule, model.fusion.depth, model.fusion.stride):
        crossing = kind != "connected"
        blocks.append((1, pairs * (texts if crossing else texts + pictures), crossing * pictures))
    if config.objectives.prefix.weight:
        blocks.append((model.decoder.depth, config.data.target_length - 1, pictures + texts))
    for depth, own, memory in blocks:
        forward += depth * width * (2 + (memory > 0)) * own
        backward += depth * width * ((4 + (memory > 0)) * own + 2 * memory)
    passes = 1 + (model.remat != "none") + (program.state.momentum_params is not None)
    size = rows * item * (passes * forward + backward)
    return [Collective("sums of split layers", "all-reduce", tensor, 1, size)]


def _sharing_layers(config: ConfigDict) -> int:
    """Cross layers in which several texts share the keys and values of a picture."""
    fusion = config.model.fusion
    kinds = layer_kinds(fusion.schedule, fusion.depth, fusion.stride)
    return next((i for i, kind in enumerate(kinds) if kind != "cross"), len(kinds))


def _tokens(config: ConfigDict) -> int:
    vision = config.model.vision
    rows, columns = (s // p for s, p in zip(vision.image_size, vision.patch_size, strict=True))
    return config.model.frames * (1 + rows * columns)


def _width(config: ConfigDict) -> int:
    """Bytes of a token."""
    return config.model.text.width * (2 if config.model.dtype == "bfloat16" else 4)
