"""The files of a source that comes in many: those of a folder, or that a pattern matches."""

import glob
import os
from pathlib import Path

from mplug_jax.data.files import Place, RemotePath
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.file_records import named_in_config, rooted


def find_shards(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    marks: tuple[str, ...],
) -> list[Place]:
    """The shards that `path` names, in the order of their names.

    Args:
      path: one file, a pattern with * and ? (and, of local files, [..]), or a folder; a path or a
        URL, joined with `root` where relative.
      root: config.data.root.
      marks: of a folder, the files whose names hold one of these count; names that begin with a
        dot never do.

    Raises:
      SourceError: there is none.
    """
    whole = rooted(path, root)
    if whole.is_file():
        return [whole]
    if whole.is_dir():
        inside = whole.matches() if isinstance(whole, RemotePath) else sorted(whole.iterdir())
        found = [file for file in inside if _is_shard(file, marks)]
        if not found:
            raise SourceError(
                f"the folder {named_in_config(whole, path, root)} holds no file called "
                f"{' or '.join('*' + mark for mark in marks)}"
            )
        return found
    if isinstance(whole, RemotePath):
        found = whole.parent.matches(whole.url.rpartition("/")[2])
    else:
        found = [Path(name) for name in sorted(glob.glob(str(whole)))]
    if not found:
        raise SourceError(
            f"there is no file or folder, and no match of a pattern with *, at "
            f"{named_in_config(whole, path, root)}"
        )
    return found


def _is_shard(file: Place, marks: tuple[str, ...]) -> bool:
    name = str(file).rpartition("/")[2]
    return not name.startswith(".") and any(
        name.endswith(mark) or f"{mark}-" in name for mark in marks
    )
