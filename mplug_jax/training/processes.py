"""Joins the processes of one run: who coordinates, how many there are, which of them this is.

A run of several processes is started by one launcher, which says so in the environment. What is
given explicitly goes before what is found there:

1. flags: ``--coordinator=host:port --num_processes=N --process_id=i``;
2. variables of the same meaning, which ``launch/local.sh`` and ``launch/kubernetes.yaml`` set:
   ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, or, of a Kubernetes
   indexed job, ``JOB_COMPLETION_INDEX``;
3. SLURM and Open MPI, as JAX reads them, where they tell of more than one task;
4. ``--detect_processes``: whatever else JAX detects, which on a TPU pod is the metadata server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

from mplug_jax.config import ConfigError

logger = logging.getLogger(__name__)

VARIABLES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS",),
    "num_processes": ("JAX_NUM_PROCESSES",),
    "process_id": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
}
# What only a task of several has: (number of tasks, number of this one).
LAUNCHERS = {
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


class Membership(NamedTuple):
    """How to join: by address, or by a name of JAX's own detection ('' lets it try all)."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    detection: str | None = None


def membership(
    given: Mapping[str, str], environment: Mapping[str, str], *, detect: bool = False
) -> Membership | None:
    """What flags and environment say, or None for a run of one process.

    Args:
      given: the flags 'coordinator', 'num_processes' and 'process_id'; '' where not given.
      environment: the variables of the process.
      detect: whether JAX is to look for what it knows, a TPU pod above all.

    Raises:
      ConfigError: only part of an address, or one that cannot be.
    """
    found = {name: (f"--{name}", value) for name, value in given.items() if value}
    if not found:
        found = {
            name: (variable, environment[variable])
            for name, variables in VARIABLES.items()
            for variable in reversed(variables)
            if environment.get(variable)
        }
        # A job of independent tasks has an index too.
        found = found if set(found) - {"process_id"} else {}
    if found:
        return _addressed(found)
    for name, (tasks, task) in LAUNCHERS.items():
        # `salloc` alone, without `srun`, tells of tasks but not which one this is.
        if task in environment and _integer(tasks, environment.get(tasks, "1")) > 1:
            return Membership(detection=name)
    return Membership(detection="") if detect else None


def connect(joining: Membership | None, *, heartbeat_timeout: int) -> None:
    """Joins the other processes; to be called before anything asks JAX for its devices.

    Args:
      joining: what ``membership`` returned.
      heartbeat_timeout: seconds after which a process that is silent counts as lost; JAX itself
        waits four times as long.

    Raises:
      ConfigError: no such launcher here, or the coordinator does not answer.
    """
    if joining is None:
        return
    try:
        jax.distributed.initialize(
            joining.coordinator,
            joining.num_processes,
            joining.process_id,
            cluster_detection_method=joining.detection or None,
            # JAX aborts without a word for people, so ours (peers.py) shall come first. JAX's beats
            # are half of its time apart and it counts from the last: half may be over already.
            heartbeat_timeout_seconds=4 * heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        where = joining.coordinator or f"the {joining.detection or 'environment'}'s"
        raise ConfigError(
            f"This process cannot join the others, coordinator {where}: {error}. Check that "
            "process 0 runs there and that the port is open; a run of one process needs none of "
            "--coordinator, --num_processes, --process_id and --detect_processes, nor "
            f"{', '.join(v for variables in VARIABLES.values() for v in variables)}."
        ) from error
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def _addressed(found: Mapping[str, tuple[str, str]]) -> Membership:
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        names = " or ".join((f"--{missing[0]}", *VARIABLES[missing[0]]))
        raise ConfigError(
            f"{', '.join(name for name, _ in found.values())} given, but not {missing[0]}: a run "
            f"of several processes needs {names} too."
        )
    name, address = found["coordinator"]
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ConfigError(f"{name}={address!r} is no address: write host:port.")
    count = _integer(*found["num_processes"])
    index = _integer(*found["process_id"])
    if not 0 <= index < count:
        raise ConfigError(
            f"{found['process_id'][0]}={index} is no number of a process: with "
            f"{found['num_processes'][0]}={count} they are 0 to {count - 1}."
        )
    return Membership(address, count, index)


def _integer(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} must be a number.")
    return int(text)
