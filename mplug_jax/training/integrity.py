"""Whole and damaged checkpoints: checksums over their files, and what is done where they fail."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
# Orbax writes the last two after the checksums; nothing that is restored depends on them.
_NOT_COVERED = {CHECKSUMS_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}
# Without this file of Orbax's, no array can be found.
_INDEX = "state/_METADATA"
# SHA-256 takes about a second for a gigabyte and core, and frees Python meanwhile.
_THREADS = 4


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not saved, or does not fit the model."""


def find_checkpoint(path: str | Path, given_as: str = "config.init_from") -> Path:
    """The ``.../checkpoints/<step>`` folder meant by a workdir, its checkpoints, or one of them.

    Args:
      given_as: the setting or argument that the user gave the path as, for the message.

    Raises:
      CheckpointError: nothing there.
    """
    path = Path(path).absolute()
    for root in (path / "checkpoints", path):
        steps = [int(p.name) for p in root.glob("*") if p.name.isdigit()] if root.is_dir() else []
        if steps:
            return root / str(max(steps))
    if (path / "state").is_dir():
        return path
    raise CheckpointError(
        f"{given_as}={path}: no checkpoint there. Give a workdir of a run, its checkpoints folder, "
        "or one step's folder."
    )


def write_checksums(folder: Path) -> None:
    """Writes ``folder/checksums.json``: size in bytes and SHA-256 of every file below it.

    Reads all of it once, from the page cache if it was just written.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in _NOT_COVERED]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_sha256, (folder / name for name in names))
        listed = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(listed, indent=1) + "\n")


def damages(folder: Path, part: str = "") -> list[str]:
    """What is wrong with a checkpoint, a phrase for each file; empty for one that is whole.

    Without checksums only a checkpoint that lacks its index is seen to be broken.

    Args:
      part: only files whose name starts with this, such as 'metrics/'.
    """
    if not _has_checksums(folder):
        return [] if (folder / _INDEX).is_file() else [f"{_INDEX} is missing"]
    try:
        listed = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads((folder / CHECKSUMS_FILE).read_text()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return [f"{CHECKSUMS_FILE} cannot be read ({error})"]
    names = [name for name in listed if name.startswith(part)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _damage(folder / name, *listed[name]), names)
        return [f"{name} {what}" for name, what in zip(names, found, strict=True) if what]


def newest_whole(root: Path, most: int) -> int | None:
    """The step of the newest whole checkpoint up to step ``most``, or None; changes nothing."""
    steps = sorted((int(p.name) for p in root.glob("*") if p.name.isdigit()), reverse=True)
    return next((s for s in steps if s <= most and not damages(root / str(s))), None)


def set_damaged_aside(root: Path) -> None:
    """Renames damaged checkpoints that are newer than the newest whole one.

    Of older ones only the metrics are looked at. All processes wait until process 0 is done.

    Raises:
      CheckpointError: none is whole; nothing was renamed.
    """
    error = None
    if jax.process_index() == 0:
        try:
            _set_aside(root)
        except CheckpointError as failure:
            error = failure
    if multihost_utils.broadcast_one_to_all(np.bool_(error is not None)):
        raise error or CheckpointError(f"No checkpoint in {root} is whole: see process 0.")


def _set_aside(root: Path) -> None:
    folders = [p for p in root.glob("*") if p.name.isdigit() and p.is_dir()]
    damaged: dict[Path, list[str]] = {}
    whole = None
    for folder in sorted(folders, key=lambda p: int(p.name), reverse=True):
        found = damages(folder, part="" if whole is None else "metrics/")
        if found:
            damaged[folder] = found
        elif whole is None:
            whole = folder
    if whole is None and damaged:
        listed = "".join(f"\n  {f.name}: {_described(found)}" for f, found in damaged.items())
        raise CheckpointError(
            f"No checkpoint in {root} is whole:{listed}\nNothing was changed. Bring the files "
            "back, or give another --workdir."
        )
    if whole is not None and not _has_checksums(whole):
        logger.warning("%s was saved without checksums: it is taken as it is.", whole)
    for folder, found in damaged.items():
        place = folder.with_name(f"{folder.name}.damaged")
        while place.exists():
            place = place.with_name(f"{place.name}+")
        folder.rename(place)
        logger.warning(
            "The checkpoint of step %s is damaged (%s) and now called %s; delete it if you have no "
            "use for it. The newest whole one is of step %s.",
            *(folder.name, _described(found), place, whole.name),
        )


def check_parameters(folder: Path) -> None:
    """Compares the files of the state with their checksums, if there are any.

    Raises:
      CheckpointError: one of them is damaged.
    """
    if _has_checksums(folder) and (found := damages(folder, part="state/")):
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {_described(found)}. Give another one: the "
            "folder of another step, or another run."
        )


def _has_checksums(folder: Path) -> bool:
    return (folder / CHECKSUMS_FILE).exists()


def _described(found: Sequence[str], most: int = 5) -> str:
    """The first few damages in one line."""
    rest = f", and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def _damage(path: Path, size: int, digest: str) -> str:
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes instead of {size}"
        return "" if _sha256(path) == digest else "has other bytes than were saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_position(folder: Path) -> dict[str, Any]:
    """The data iterator's state, which is the same for all processes.

    Raises:
      CheckpointError: there is none.
    """
    # The first checkpoints have a file of each process.
    for path in (folder / "metadata", *sorted(folder.glob("process_*-of-*.json"))):
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    raise CheckpointError(f"{folder} lacks the position in the data; the checkpoint is not whole.")
