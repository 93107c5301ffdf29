"""The partitioned program of a mesh, compiled for fake CPU devices in a process of its own.

``python -m mplug_jax.planning.compiled`` reads a request as JSON and answers with one line of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from mplug_jax.planning.chips import PlanError
from mplug_jax.planning.collectives import Collective
from mplug_jax.planning.hlo import collectives_of
from mplug_jax.planning.program import build_program, lower
from mplug_jax.saved_config import from_settings
from mplug_jax.training.sharding import make_mesh

MOST_DEVICES = 64
PATIENCE = 240  # seconds that 'auto' waits
# The kernels are not run: they need no optimisation, and what is measured is settled before them.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of the program for one CPU device.

    Attributes:
      arguments, temporaries: bytes.
      collectives: all that the program's text holds.
      seconds: that it compiled for.
    """

    arguments: float
    temporaries: float
    collectives: list[Collective]
    seconds: float


def compile_here(config: ConfigDict, shape: Mapping[str, int]) -> Compiled:
    """Compiles in this process, which must have the mesh's number of devices."""
    mesh = make_mesh(shape)
    lowered = lower(build_program(config, mesh))
    began = time.perf_counter()
    compiled = lowered.compile(QUICKLY)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives_of(compiled.as_text(), mesh.size),
        seconds,
    )


def compile_apart(
    config: ConfigDict, shape: Mapping[str, int], devices: int, *, patience: float | None
) -> Compiled | None:
    """Compiles in another process; None if that takes longer than ``patience`` seconds.

    Raises:
      PlanError: the process failed; the message ends with its last line.
    """
    request = {"config": config.to_dict(), "mesh": dict(shape), "devices": devices}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=patience,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise PlanError(f"the program could not be compiled for {devices} devices: {last}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    answer["collectives"] = [Collective(**each) for each in answer["collectives"]]
    return Compiled(**answer)


def main() -> None:
    """Answers one request."""
    request: dict[str, Any] = json.load(sys.stdin)
    jax.config.update("jax_num_cpu_devices", request["devices"])
    compiled = compile_here(from_settings(request["config"]), request["mesh"])
    print(json.dumps(dataclasses.asdict(compiled)))


if __name__ == "__main__":
    main()
