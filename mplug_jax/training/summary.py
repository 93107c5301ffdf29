"""What a run prints before its first step: parameters, where they came from, memory, FLOPs."""

from __future__ import annotations

from typing import Any

import jax

from mplug_jax.models.mplug import count_params


def describe_parameters(params: Any, source: str) -> str:
    """Parameter counts by module, in millions, and the initialisation used."""
    counts = {name: count_params(value) for name, value in params.items()}
    lines = [f"  {name:<16} {count / 1e6:>9.3f} M" for name, count in counts.items()]
    return "\n".join([*lines, f"parameters: {sum(counts.values()) / 1e6:.3f} M; init: {source}"])


def describe_step(compiled: Any, flops: int, seconds: float, mesh: Any) -> str:
    """Model FLOPs of a compiled step and its memory on one device, by XLA's own account."""
    memory = compiled.memory_analysis()
    state, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    kind = jax.devices()[0].device_kind
    return (
        f"step: {flops / 1e9:.2f} model GFLOPs, compiled in {seconds:.1f} s; per device "
        f"{(state + temporaries) / 2**20:.0f} MiB (state and batch {state / 2**20:.0f}, "
        f"temporaries {temporaries / 2**20:.0f}) on {mesh.size} x {kind}"
    )
