"""One forecast: what a config needs on a mesh of a chip, and what to change if it does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.config import ConfigError
from mplug_jax.models.mplug import count_params
from mplug_jax.planning.chips import PlanError, chip_named
from mplug_jax.planning.collectives import Collective, formula_collectives
from mplug_jax.planning.compiled import MOST_DEVICES, PATIENCE, Compiled, compile_apart
from mplug_jax.planning.memory import (
    Memory,
    device_usage,
    forecast_memory,
    gathered_on_device,
    largest_rows,
)
from mplug_jax.planning.program import Program, build_program
from mplug_jax.planning.roofline import Roofline, roofline
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.sharding import MeshError, batch_parts, make_mesh, on_mesh

COMPILE = ("auto", "always", "never")
# What the runtime and its libraries keep of a chip's memory.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Forecast:
    """All figures of a plan; bytes and FLOPs are of one device unless they say otherwise.

    Attributes:
      dtype: of the arithmetic; row_parts: parts that the batch is split into.
      parameters: counts by module.
      model_flops, hardware_flops: of a step on all devices, without and with recomputation.
      compiled: what the compiler says, or None; why_not: why it was not asked.
      corrected: its temporaries as on the chip, see ``temporaries_on_chip``; None without it.
      largest: rows of a device and micro-batch that fit; suggestion: '' if the config fits.
    """

    chip_name: str
    dtype: str
    mesh: dict[str, int]
    row_parts: int
    batch_size: int
    accumulate: int
    total_steps: int
    parameters: dict[str, int]
    memory: Memory
    model_flops: float
    hardware_flops: float
    collectives: list[Collective]
    roofline: Roofline
    compiled: Compiled | None
    why_not: str
    corrected: float | None
    largest: int
    suggestion: str
    assumptions: tuple[str, ...]

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def total(self) -> float:
        """Bytes at the peak: with the compiler's temporaries, corrected, where it was asked."""
        memory = self.memory
        if self.corrected is None:
            return memory.total
        return memory.state + memory.batch + self.corrected

    @property
    def fits(self) -> bool:
        """Whether the peak fits what is usable of the chip."""
        return self.total <= USABLE * chip_named(self.chip_name).memory


def forecast(
    config: ConfigDict, shape: Mapping[str, int], devices: int, chip_name: str, compiling: str
) -> Forecast:
    """Makes a forecast; this process must have ``devices`` devices, fake ones will do.

    Args:
      shape: devices by mesh axis.
      compiling: 'always', 'never', or 'auto': on meshes up to ``MOST_DEVICES`` devices, given up
        after ``PATIENCE`` seconds.

    Raises:
      PlanError, ConfigError, MeshError: a mistake in the flags or the config.
    """
    chip = chip_named(chip_name)
    mesh = make_mesh(shape, jax.devices()[:devices])
    program = build_program(config, mesh)
    memory = forecast_memory(config, program)
    compiled, why_not = _compiled(config, shape, devices, compiling)
    corrected = None if compiled is None else temporaries_on_chip(compiled, config, program)
    exchanged = compiled.collectives if compiled else formula_collectives(config, program)
    with on_mesh(mesh):
        model = matmul_flops(program.step_without_remat, program.state, program.batch)
        hardware = matmul_flops(program.step, program.state, program.batch)
    dtype = config.model.dtype
    times = roofline(chip, dtype, hardware / devices, memory.traffic, exchanged, devices)
    room = USABLE * chip.memory
    needed = memory.state + memory.batch + (corrected or memory.temporaries)
    return Forecast(
        chip_name,
        dtype,
        dict(mesh.shape),
        batch_parts(mesh),
        config.batch_size,
        config.accumulate,
        config.total_steps,
        {name: count_params(tree) for name, tree in program.state.params.items()},
        memory,
        model,
        hardware,
        exchanged,
        times,
        compiled,
        why_not,
        corrected,
        largest_rows(config, mesh, room, memory),
        "" if needed <= room else suggest(config, mesh, room, memory.state),
        program.assumptions,
    )


def temporaries_on_chip(compiled: Compiled, config: ConfigDict, program: Program) -> float:
    """Temporaries of a program compiled for the CPU, corrected for what the CPU backend does.

    It widens bfloat16 to float32 and keeps what layers outside of a loop should recompute:
    ``compiled x walk / walk as on the CPU``.
    """
    gathered = gathered_on_device(config, program)
    widened = gathered * (2 if config.model.dtype == "bfloat16" else 1)
    plain = device_usage(config, program).peak + gathered
    return (
        compiled.temporaries * plain / (device_usage(config, program, on_cpu=True).peak + widened)
    )


def suggest(config: ConfigDict, mesh: Mesh, room: float, state: float) -> str:
    """The first change with which the config fits ``room`` bytes, cheapest first, or what is left
    to try. ``state``: bytes that lie there between two steps, which only another split changes."""
    changes = [] if state > room else [_saving(config, mesh)]
    for words, changed, changed_mesh in itertools.chain(*changes, _splitting(config, mesh)):
        try:
            program = build_program(changed, changed_mesh)
        except (ConfigError, MeshError):
            continue
        if forecast_memory(changed, program).total <= room:
            return words
    return (
        "more devices, a smaller model or a chip with more memory: no remat policy, accumulation "
        "up to 16 or split of the parameters makes it fit"
    )


def _saving(config: ConfigDict, mesh: Mesh) -> Iterator[tuple[str, ConfigDict, Mesh]]:
    """Changes that keep the mesh."""
    policies = ("none", "dots", "dots_no_batch", "full")
    for policy in policies[policies.index(config.model.remat) + 1 :]:
        yield f"--config.model.remat={policy}", _with(config, remat=policy), mesh
    for count in (2, 4, 8, 16):
        if config.batch_size % (batch_parts(mesh) * config.accumulate * count) == 0:
            total = config.accumulate * count
            changed = _with(config, remat="full", accumulate=total)
            yield f"--config.model.remat=full --config.accumulate={total}", changed, mesh


def _splitting(config: ConfigDict, mesh: Mesh) -> Iterator[tuple[str, ConfigDict, Mesh]]:
    """Changes that split the parameters further."""
    shape = dict(mesh.shape)
    for size in (2, 4, 8, 16, 32, 64):
        if shape["data"] % size == 0:
            split = {**shape, "data": shape["data"] // size, "fsdp": shape["fsdp"] * size}
            other = make_mesh(split, list(mesh.devices.flat))
            words = ",".join(f"{axis}:{n}" for axis, n in split.items())
            yield f"--mesh={words} --config.model.remat=full", _with(config, remat="full"), other


def _with(config: ConfigDict, *, remat: str, accumulate: int | None = None) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.remat = remat
        config.accumulate = accumulate or config.accumulate
    return config


def _compiled(
    config: ConfigDict, shape: Mapping[str, int], devices: int, compiling: str
) -> tuple[Compiled | None, str]:
    if compiling not in COMPILE:
        raise PlanError(f"--compile={compiling} is unknown; choose {', '.join(COMPILE)}.")
    if compiling == "never":
        return None, "--compile=never"
    if compiling == "auto" and devices > MOST_DEVICES:
        return None, f"more than {MOST_DEVICES} devices"
    patience = PATIENCE if compiling == "auto" else None
    compiled = compile_apart(config, shape, devices, patience=patience)
    return compiled, "" if compiled else f"not compiled within {PATIENCE} s"
