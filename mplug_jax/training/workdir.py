"""A workdir belongs to one config and to one run at a time, and tells what it was made with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mplug_jax.config import defaults, save_config

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
ENVIRONMENT_FILE = "environment.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Keys and groups that a run may change when it continues: how long it goes on, when it reports,
# judges and saves, and how the same batches are made and spread over devices. None of it says what
# an update is, with one exception that is wanted: more steps stretch the schedule to their end.
FREE = (
    "total_steps",
    "log_every",
    "spike_factor",
    "eval_every",
    "checkpoint_every",
    "evals",
    "checkpoint",
    "data.workers",
    "data.threads",
    "mesh",
    "optimizer.offload",
)
_ABSENT = "(absent)"


class WorkdirError(ValueError):
    """A workdir that this run may not use: it is another's, or another config's."""


@contextlib.contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Keeps other runs out of the workdir, by a lock that ends with the process however it ends.

    For process 0 alone. The file ``run.lock`` stays; it names the last run's host and process.

    Raises:
      WorkdirError: another run is using the workdir.
    """
    # Python lets no program that it starts inherit the file, so no worker can outlive the lock.
    with (Path(workdir) / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise WorkdirError(
                f"--workdir={workdir} is in use by another run ({file.read().strip()}). Stop that "
                "one first, or give another --workdir."
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): let no other run use it.", workdir, error)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        yield


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """'old → new' by the dotted key of each setting that differs, both written as JSON.

    A setting that the old config had not heard of counts as having had its default.
    """
    before, after = _flat(old), _flat(new)
    untold = _flat(_plain(defaults("base").to_dict()))
    before = {key: untold[key] for key in after.keys() & untold.keys()} | before
    return {
        key: f"{before.get(key, _ABSENT)} → {after.get(key, _ABSENT)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def check_config(config: ConfigDict, workdir: str | Path, *, allow_change: bool) -> dict[str, str]:
    """What differs from the config of the run that is continued, by key.

    Without a checkpoint there is no run to continue, and nothing to compare with.

    Raises:
      WorkdirError: a setting differs that is not FREE, and no change was allowed.
    """
    path = Path(workdir) / "config.json"
    begun = any(p.name.isdigit() for p in (Path(workdir) / "checkpoints").glob("*"))
    if not begun or not path.exists():
        return {}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(old, Mapping):
            raise ValueError("it is no object of settings")
    except (OSError, ValueError) as error:
        if allow_change:
            return {}
        raise WorkdirError(
            f"{path} cannot be read ({error}), so whether this is the run's config is not known. "
            "With --allow_config_change the run continues with the config given."
        ) from error
    changed = changes(old, _plain(config.to_dict()))
    refused = [key for key in changed if not any(f"{key}.".startswith(f"{free}.") for free in FREE)]
    if refused and not allow_change:
        raise WorkdirError(
            f"The run in {workdir} has another config:\n{_listed(changed, refused)}\n"
            f"Continue it with its own, --config={path}; or with --allow_config_change, from its "
            "last checkpoint on with the new one; or give another --workdir."
        )
    return changed


def record_start(
    config: ConfigDict, workdir: str | Path, step: int, changed: Mapping[str, str]
) -> None:
    """Writes config.json, adds a line to environment.jsonl, and tells what changed in the config.

    For process 0 alone, once the state is there: from now on the run has this config.

    Args:
      step: where the run starts or continues.
      changed: what ``check_config`` returned.
    """
    if changed:
        print(f"the config has changed:\n{_listed(changed, list(changed))}", flush=True)
    save_config(config, workdir)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "seed": config.seed,
        "changed": dict(changed),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git": git_revision(Path(__file__).parents[2]),
    }
    with (Path(workdir) / ENVIRONMENT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def git_revision(root: Path) -> str | None:
    """The commit of a checkout, with '-dirty' where files differ from it; None where none is."""
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _listed(changed: Mapping[str, str], keys: Sequence[str]) -> str:
    return "\n".join(f"  {key}: {changed[key]}" for key in keys)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be read from config.json: lists for tuples."""
    return json.loads(json.dumps(settings))


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """JSON of each setting by its dotted key; of lists of groups, too, with their numbers."""
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return {key: json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for name, inner in items:
        flat |= _flat(inner, f"{key}.{name}".lstrip("."))
    return flat
