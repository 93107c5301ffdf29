"""A forecast in words and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mplug_jax.planning.chips import chip_named
from mplug_jax.planning.forecast import USABLE, Forecast
from mplug_jax.planning.roofline import BANDWIDTH, COMPUTE, NETWORK

GB = 1e9
DAY = 86_400.0


def figures(plan: Forecast) -> dict[str, Any]:
    """What follows from the forecast and the chip: rates, utilisation, the whole recipe."""
    chip, step = chip_named(plan.chip_name), plan.roofline.step
    seconds = step * plan.total_steps
    peak = plan.devices * chip.peak[plan.dtype]
    return {
        "step_seconds": step,
        "step_seconds_without_overlap": plan.roofline.serial,
        "binds": plan.roofline.binds,
        "images_per_second": plan.batch_size / step,
        "images_per_second_per_device": plan.batch_size / step / plan.devices,
        "mfu": plan.model_flops / step / peak,
        "days": seconds / DAY,
        "days_without_overlap": plan.roofline.serial * plan.total_steps / DAY,
        "device_hours": seconds * plan.devices / 3600,
        "bytes": plan.total,
        "fits": plan.fits,
    }


def as_json(plan: Forecast) -> dict[str, Any]:
    """Everything, in bytes, FLOPs and seconds."""
    tree = dataclasses.asdict(plan)
    sent = [{**dataclasses.asdict(c), "sent": c.sent} for c in plan.collectives]
    return {**tree, "collectives": sent, "figures": figures(plan)}


def as_text(plan: Forecast) -> str:
    """The table that the command prints."""
    parts = (_head, _parameters, _memory, _flops, _exchanges, _time)
    return "\n".join(line for part in parts for line in part(plan))


def _head(plan: Forecast) -> Iterator[str]:
    mesh = ", ".join(f"{axis}:{size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    rows = plan.batch_size // plan.row_parts // plan.accumulate
    yield (
        f"{plan.devices} x {plan.chip_name} ({mesh}); batch {plan.batch_size:,}: {rows} a device"
        + (f" and micro-batch, {plan.accumulate} of them" if plan.accumulate > 1 else "")
    )
    yield from (f"assumed: {each}" for each in plan.assumptions)


def _parameters(plan: Forecast) -> Iterator[str]:
    yield f"\nparameters {sum(plan.parameters.values()) / 1e6:,.1f} M"
    for name, count in sorted(plan.parameters.items(), key=lambda item: -item[1]):
        if count >= 1e5:
            yield f"  {name:<38}{count / 1e6:>10,.1f} M"


def _memory(plan: Forecast) -> Iterator[str]:
    memory, chip = plan.memory, chip_named(plan.chip_name)
    yield "\nmemory of a device, GB"
    for name in ("params", "optimizer", "teacher", "queue", "batch"):
        yield f"  {name:<38}{getattr(memory, name) / GB:>10.2f}"
    source = "walk of the traced program"
    yield f"  {'activations and gradients':<38}{memory.temporaries / GB:>10.2f}  {source}"
    yield f"    {'of which gradients, at the end':<36}{memory.gradients / GB:>10.2f}"
    if plan.compiled:
        raw = plan.compiled.temporaries / GB
        yield f"  {'the same, compiled for the CPU':<38}{raw:>10.2f}  as compiled"
        yield f"  {'':<38}{plan.corrected / GB:>10.2f}  corrected for bfloat16 and remat there"
    else:
        yield f"  (not compiled: {plan.why_not})"
    yield f"  {'peak':<38}{plan.total / GB:>10.2f}  of {chip.memory / GB:.0f}, {USABLE:.0%} usable"
    verdict = "fits" if plan.fits else f"does NOT fit; try {plan.suggestion}"
    rows = plan.batch_size // plan.row_parts // plan.accumulate
    yield f"  {verdict}; at most {plan.largest} rows a device and micro-batch fit, this has {rows}"


def _flops(plan: Forecast) -> Iterator[str]:
    repeated = plan.hardware_flops / plan.model_flops - 1
    yield "\narithmetic of a step, all devices, TFLOP"
    yield f"  {'model':<38}{plan.model_flops / 1e12:>10,.1f}"
    yield f"  {'hardware':<38}{plan.hardware_flops / 1e12:>10,.1f}  {repeated:.0%} recomputed"


def _exchanges(plan: Forecast) -> Iterator[str]:
    source = "compiled program" if plan.compiled else "formulas"
    yield f"\nsent by a device in a step, MB ({source})"
    grouped: dict[tuple[str, str, int], float] = {}
    for each in plan.collectives:
        name = "" if plan.compiled else each.name
        key = (name, each.kind, each.group)
        grouped[key] = grouped.get(key, 0.0) + each.sent
    for (name, kind, group), sent in sorted(grouped.items(), key=lambda item: -item[1]):
        yield f"  {f'{kind} over {group}':<24}{sent / 1e6:>12,.1f}  {name}".rstrip()
    if not grouped:
        yield "  nothing"


def _time(plan: Forecast) -> Iterator[str]:
    line, rates = plan.roofline, figures(plan)
    yield "\ntime of a step, ms, at " + (
        f"{COMPUTE:.0%} of peak arithmetic, {BANDWIDTH:.0%} of HBM, {NETWORK:.0%} of links"
    )
    for name in ("compute", "memory", "links", "network"):
        yield f"  {name:<38}{1e3 * getattr(line, name):>10.1f}"
    notes = {
        "step": f"{line.binds} binds; {1e3 * line.serial:.1f} without overlap",
        "images": f"{rates['images_per_second_per_device']:,.0f} a device",
        "days": f"{rates['device_hours']:,.0f} device-hours; "
        f"{rates['days_without_overlap']:.1f} days without overlap",
    }
    yield f"  {'step':<38}{1e3 * line.step:>10.1f}  {notes['step']}"
    yield f"  {'images/s':<38}{rates['images_per_second']:>10,.0f}  {notes['images']}"
    yield f"  {'model FLOP utilisation':<38}{rates['mfu']:>10.1%}"
    yield f"  {f'{plan.total_steps:,} steps, days':<38}{rates['days']:>10.1f}  {notes['days']}"
