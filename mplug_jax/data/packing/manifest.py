"""The manifest of a packed folder: what it was made with, and whether it is finished."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mplug_jax.data.files import write_whole
from mplug_jax.data.packing.shards import Job, part_file, source_of
from mplug_jax.data.records import SourceError

MANIFEST, REPORT = "manifest.json", "report.jsonl"


def begin(job: Job, out: str) -> list[int]:
    """Claims a folder for a job.

    Returns:
      The shards that are still to be written; none of a finished folder.

    Raises:
      SourceError: the folder was packed with other settings, holds a damaged manifest or has lost
        shards, or cannot be written.
    """
    path = Path(out) / MANIFEST
    try:
        if not path.exists():
            _write(path, {"settings": job.settings(), "finished": False})
            return list(range(job.shards))
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise SourceError(f"--out={out} cannot be used: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(
            f"{path} is damaged ({error}): delete the folder or name another"
        ) from error
    old, new = manifest["settings"], job.settings()
    changed = [
        f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in new if old.get(key) != new[key]
    ]
    if changed:
        raise SourceError(
            f"{out} was packed with other settings: {'; '.join(changed)}. Give those, or another "
            "--out, or delete the folder."
        )
    if manifest["finished"]:
        lost = [name for name in manifest["shards"] if not (Path(out) / name).is_file()]
        if lost:
            raise SourceError(
                f"{out} is finished, but {', '.join(lost[:5])} is gone: delete {MANIFEST} and run "
                "the command again, which packs everything anew."
            )
        return []
    return [shard for shard in range(job.shards) if not part_file(out, shard).exists()]


def finish(job: Job, out: str) -> dict[str, Any]:
    """Puts the parts of all shards together into report and manifest, and returns the latter.

    Of a folder that is finished already, its manifest.

    Raises:
      SourceError: nothing was packed.
    """
    manifest = json.loads((Path(out) / MANIFEST).read_text())
    if manifest["finished"]:
        return manifest
    parts = {shard: json.loads(part_file(out, shard).read_text()) for shard in range(job.shards)}
    counts: Counter[str] = Counter()
    for part in parts.values():
        counts.update(part["counts"])
    dropped = [row for part in parts.values() for row in part["dropped"]]
    for number in range(len(job.sources)):
        # Rows that were no records at all, where the source remembers them.
        rows = getattr(source_of(job, number), "bad_records", [])
        counts["unusable rows"] += len(rows)
        dropped += [{"id": where, "path": "", "reason": reason} for where, reason in rows]
    if not counts["packed"]:
        first = dropped[0]["reason"] if dropped else "the sources hold no records"
        raise SourceError(f"{out}: nothing could be packed. The first reason: {first}")
    lines = "".join(json.dumps(row) + "\n" for row in dropped)
    write_whole(Path(out) / REPORT, lambda unfinished: Path(unfinished).write_text(lines))
    written = {job.shard_name(n): part for n, part in parts.items() if part["sha256"]}
    manifest = {
        "settings": job.settings(),
        "finished": True,
        "counts": dict(counts),
        "shards": {
            name: {"records": part["counts"]["packed"], "sha256": part["sha256"]}
            for name, part in written.items()
        },
    }
    _write(Path(out) / MANIFEST, manifest)
    for shard in parts:
        part_file(out, shard).unlink()
    part_file(out, 0).parent.rmdir()
    return manifest


def _write(path: Path, manifest: dict[str, Any]) -> None:
    content = json.dumps(manifest, indent=2) + "\n"
    write_whole(path, lambda unfinished: Path(unfinished).write_text(content))
