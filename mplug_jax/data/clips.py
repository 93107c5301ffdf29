"""Frames of clips: from an array, pictures, a folder of pictures, or a video file."""

import importlib
import os
import re
from collections.abc import Callable
from types import ModuleType

import numpy as np

from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.transforms import decode_image

# What counts as a frame in a folder.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_clip(
    video: np.ndarray | str | os.PathLike[str] | list[str], frames: int
) -> list[np.ndarray]:
    """`frames` frames of a clip, uint8 RGB [H, W, 3], uniformly spaced by `frame_indices`.

    Args:
      video: uint8 [T, H, W, 3]; the paths of its frames; the path of a folder of pictures, which
        are its frames in the order of their names, numbers by value ("2.jpg" before "10.jpg"); or
        the path of a video file, read by PyAV or else by decord.
      frames: how many, at least 1.

    Raises:
      BadSample: the clip is missing, empty or broken; the message has path and reason.
      SourceError: the clip is a file, and neither PyAV nor decord is installed.
    """
    if isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
            raise BadSample(
                f"<array>: {video.dtype} {list(video.shape)} is no uint8 clip [T, H, W, 3]"
            )
        return [video[index] for index in frame_indices(len(video), frames)]
    if isinstance(video, list):
        return [decode_image(video[index]) for index in frame_indices(len(video), frames)]
    path = os.fspath(video)
    if os.path.isdir(path):
        return _of_folder(path, frames)
    if not os.path.isfile(path):
        raise BadSample(f"{path}: no such video file or folder of frames")
    return _of_file(path, frames)


def frame_indices(total: int, frames: int) -> list[int]:
    """The frames shown of `total`: 0, total/frames, 2 total/frames, ..., rounded down.

    A clip of fewer than `frames` frames shows some of them again.
    """
    if frames < 1 or total < 1:
        raise ValueError(f"frames={frames} of a clip of {total}: both must be at least 1")
    return [index * total // frames for index in range(frames)]


def _of_folder(path: str, frames: int) -> list[np.ndarray]:
    names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES)]
    if not names:
        raise BadSample(f"{path}: the folder holds no frames ({', '.join(PICTURES)})")
    names.sort(key=_by_number)
    return [decode_image(os.path.join(path, names[i])) for i in frame_indices(len(names), frames)]


def _by_number(name: str) -> list[tuple[int, str]]:
    # Text between the numbers sorts as text; the pairs keep the two from being compared.
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _of_file(path: str, frames: int) -> list[np.ndarray]:
    if not os.path.getsize(path):
        raise BadSample(f"{path}: the file is empty")
    package, read = _decoder(path)
    try:
        return read(package, path, frames)
    except BadSample:
        raise
    except Exception as error:  # decoders raise whatever their parsing stumbles over
        raise BadSample(f"{path}: cannot be decoded: {error}") from error


def _decoder(path: str) -> tuple[ModuleType, Callable[..., list[np.ndarray]]]:
    for name, read in (("av", _with_av), ("decord", _with_decord)):
        try:
            # Here, since both are optional and take long to load.
            return importlib.import_module(name), read
        except ImportError:
            continue
    raise SourceError(
        f"reading the video {path} needs PyAV: pip install av (or decord). Folders of frames need "
        "neither: put the pictures of a clip into a folder of the clip's name"
    )


def _with_av(av: ModuleType, path: str, frames: int) -> list[np.ndarray]:
    total = _count(av, path)
    wanted = frame_indices(total, frames) if total else []
    shown: list[np.ndarray] = []
    decoded = 0
    with av.open(path) as container:
        for frame in container.decode(video=0):
            repeats = wanted.count(decoded)
            decoded += 1
            if repeats:
                shown += [frame.to_ndarray(format="rgb24")] * repeats
            if len(shown) == len(wanted):
                break
    if not shown or len(shown) < len(wanted):
        raise BadSample(f"{path}: ends after {decoded} of {total} frames")
    return shown


def _count(av: ModuleType, path: str) -> int:
    """Frames by the header or, where it doesn't tell, by counting their packets."""
    with av.open(path) as container:
        if not container.streams.video:
            raise BadSample(f"{path}: has no video stream")
        stream = container.streams.video[0]
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def _with_decord(decord: ModuleType, path: str, frames: int) -> list[np.ndarray]:
    reader = decord.VideoReader(path)
    if not len(reader):
        raise BadSample(f"{path}: has no frames")
    return list(reader.get_batch(frame_indices(len(reader), frames)).asnumpy())
