"""Forecast of a run, without its hardware and without its data.

    python -m mplug_jax.plan --config=configs/pretrain_base.py --mesh=data:256 --chip=h100

Memory, arithmetic, exchanges and time of a step; docs/plan.md says how each is computed. Single
settings are changed as in training, ``--config.model.remat=full``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence

import jax
from absl import app, flags
from ml_collections import config_flags

from mplug_jax.command_line import end_with_message, exit_with, explanation, reading_saved
from mplug_jax.planning.chips import CHIPS, PlanError, chip_named
from mplug_jax.planning.forecast import COMPILE, forecast
from mplug_jax.planning.report import as_json, as_text
from mplug_jax.training.sharding import AXES

USAGE = "Give --config=configs/<file>.py, or a run's config.json, --mesh=data:8 and --chip=h100."


def mesh_shape(text: str) -> dict[str, int]:
    """Devices by axis of 'data:8,fsdp:4'.

    Raises:
      PlanError: it is no such list, or names an axis twice or one that does not exist.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+):([1-9]\d*)\s*", part)
        if not match or match[1] not in AXES or match[1] in shape:
            allowed = ", ".join(f"{axis}:<devices>" for axis in AXES)
            raise PlanError(
                f"--mesh={text}: {part!r} is none of {allowed}, each given once; write for example "
                "--mesh=data:8,fsdp:4."
            )
        shape[match[1]] = int(match[2])
    return shape


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    try:
        rest = flags.FLAGS(reading_saved(argv))[1:]
        if (config := flags.FLAGS["config"].value) is not None:
            config.lock()
    except Exception as error:  # a config file may raise anything
        exit_with(explanation(argv, error))
    if rest:
        exit_with(f"Unexpected argument {rest[0]!r}: settings are given as --config.<key>=<value>.")
    return argv[:1]


def main() -> None:
    """Runs the command; a mistake is told in one message, with exit status 2."""
    config = config_flags.DEFINE_config_file(
        "config", None, "Config file, or config.json.", lock_config=True
    )
    mesh = flags.DEFINE_string("mesh", "", "Devices by axis: data:8,fsdp:4,tensor:2.")
    chip = flags.DEFINE_string("chip", "", f"One of {', '.join(CHIPS)}.")
    compiling = flags.DEFINE_string("compile", "auto", f"One of {', '.join(COMPILE)}.")
    as_data = flags.DEFINE_bool("json", False, "Print JSON, in bytes, FLOPs and seconds.")

    def run(_: Sequence[str]) -> None:
        if config.value is None or not mesh.value or not chip.value:
            exit_with(USAGE)
        # Of a schedule without connected layers, at each of many traces.
        warnings.filterwarnings("ignore", "config.model.fusion")
        try:
            chip_named(chip.value)
            shape = mesh_shape(mesh.value)
            devices = math.prod(shape.values())
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", devices)
            plan = forecast(config.value, shape, devices, chip.value, compiling.value)
        except ValueError as error:
            end_with_message(error)
        print(json.dumps(as_json(plan), indent=2) if as_data.value else as_text(plan))

    app.run(run, flags_parser=_parse_flags)


if __name__ == "__main__":
    main()
