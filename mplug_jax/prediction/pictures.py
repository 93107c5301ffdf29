"""Which pictures a person means by files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mplug_jax.data.files import is_remote
from mplug_jax.prediction.model import PredictionError


def find_pictures(given: Sequence[str]) -> list[str]:
    """The pictures meant, each once, in the order given; those of a folder or a pattern by name.

    Args:
      given: files and URLs, which are taken as they are, readable or not; folders, for all below
        them that is named like a picture; patterns of such names with ``*``, ``?``, ``[…]``, and
        ``**`` for any folders.

    Raises:
      PredictionError: a folder or a pattern with no picture.
    """
    found: dict[str, None] = {}
    for name in given:
        found |= dict.fromkeys(_meant(name))
    return list(found)


def boxed_files(pictures: Sequence[str], out: str) -> dict[str, str]:
    """The file that each picture with its box goes to.

    Args:
      pictures: their paths.
      out: the file of the only picture, or a folder, which keeps names and the folders between.

    Raises:
      PredictionError: a picture would be overwritten.
    """
    if len(pictures) == 1 and not os.path.isdir(out):
        files = {pictures[0]: out}
    else:
        above = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in pictures])
        files = {
            name: os.path.join(out, _writable(os.path.relpath(os.path.abspath(name), above)))
            for name in pictures
        }
    own = {os.path.realpath(name) for name in pictures}
    for file in files.values():
        if os.path.realpath(file) in own:
            raise PredictionError(f"--out={out} would overwrite {file}: give another place.")
    return files


def _meant(name: str) -> list[str]:
    if is_remote(name) or os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        found = [str(path) for path in Path(name).rglob("*")]
    elif glob.has_magic(name):
        found = glob.glob(name, recursive=True)
    else:
        return [name]
    readable = {suffix for suffix, kind in _kinds().items() if kind in Image.OPEN}
    pictures = sorted(
        path for path in found if Path(path).suffix.lower() in readable and os.path.isfile(path)
    )
    if not pictures:
        raise PredictionError(f"{name} {'holds' if os.path.isdir(name) else 'fits'} no pictures.")
    return pictures


def _writable(name: str) -> str:
    """The name, with .png after it where Pillow reads such files and cannot write them."""
    return name if _kinds().get(Path(name).suffix.lower()) in Image.SAVE else f"{name}.png"


def _kinds() -> dict[str, str]:
    """Pillow's name of a kind of file by suffix."""
    return Image.registered_extensions()
