"""How many bytes does a pre-training step need on a device, at the official sizes?

    python benchmarks/memory.py [--quick] [--nocompile]

mPLUG-base with 256 pairs a device at 256 px and mPLUG-large with 128 at 224 px, teacher, queue and
all objectives in bfloat16, under each remat policy, on meshes of eight devices. `walk` is the
forecast of mplug_jax.planning, `compiled` what XLA says of the program for fake CPU devices, of
which nothing is allocated, and `corrected` that number times walk / walk as the CPU backend would
have it, which widens bfloat16 to float32 and keeps what layers outside of loops should recompute.
The verdict is about the corrected number where there is one. --quick: large alone, on one mesh,
under two policies; --nocompile: the walk alone. Exit status 1 where no policy lets large fit 80 GB.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import jax
from absl import app, flags
from ml_collections import ConfigDict

from configs import pretrain_base, pretrain_large
from mplug_jax.planning.chips import chip_named
from mplug_jax.planning.compiled import compile_apart
from mplug_jax.planning.forecast import USABLE, temporaries_on_chip
from mplug_jax.planning.memory import forecast_memory
from mplug_jax.planning.program import build_program
from mplug_jax.training.sharding import batch_parts, make_mesh

DEVICES, CHIP, GB = 8, "h100", 1e9
SIZES = {"base": (pretrain_base, 256), "large": (pretrain_large, 128)}
POLICIES = ("none", "dots", "dots_no_batch", "full")
MESHES = ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2})

_QUICK = flags.DEFINE_bool("quick", False, "Large alone, one mesh, two policies.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile each program as well.")


def main(_: list[str]) -> None:
    """Prints one table."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    warnings.simplefilter("ignore", UserWarning)  # large's schedule has no connected layer
    sizes = ("large",) if _QUICK.value else tuple(SIZES)
    policies = POLICIES[2:] if _QUICK.value else POLICIES
    columns = f"{'state':>8}{'walk':>8}{'compiled':>10}{'corrected':>11}{'peak':>8}{'seconds':>9}"
    print(
        f"GB of a device, {DEVICES} devices\n{'size, rows, remat, mesh':<52}{columns}", flush=True
    )
    fitting = [
        (size, show(size, policy, shape))
        for size in sizes
        for shape in MESHES[: 1 if _QUICK.value else None]
        for policy in policies
    ]
    sys.exit(int(not any(fits for size, fits in fitting if size == "large")))


def show(size: str, policy: str, shape: dict[str, int]) -> bool:
    """Prints the line of a case; whether it fits."""
    module, rows = SIZES[size]
    mesh = make_mesh(shape)
    config = at(module.get_config(), policy, rows * batch_parts(mesh))
    program = build_program(config, mesh)
    memory = forecast_memory(config, program)
    began, raw, corrected = time.perf_counter(), math.nan, math.nan
    if _COMPILE.value:
        compiled = compile_apart(config, shape, DEVICES, patience=None)
        raw, corrected = compiled.temporaries, temporaries_on_chip(compiled, config, program)
    seconds = time.perf_counter() - began
    peak = memory.total
    if _COMPILE.value:
        peak += corrected - memory.temporaries
    fits = peak <= USABLE * chip_named(CHIP).memory
    name = f"{size}, {rows}, {policy}, {','.join(f'{a}:{n}' for a, n in shape.items())}"
    numbers = f"{memory.state / GB:>8.2f}{memory.temporaries / GB:>8.2f}{raw / GB:>10.2f}"
    numbers += f"{corrected / GB:>11.2f}{peak / GB:>8.2f}{seconds:>9.0f}"
    print(f"{name:<52}{numbers}  {'fits' if fits else 'too much'}", flush=True)
    return fits


def at(config: ConfigDict, policy: str, batch_size: int) -> ConfigDict:
    """The config with a remat policy and a batch, all of which is drawn from for negatives."""
    with config.unlocked():
        config.model.remat, config.batch_size = policy, batch_size
        config.objectives.itm.pool = 0
    return config


if __name__ == "__main__":
    app.run(main)
