"""Where the samples of a WebDataset tar lie: its headers are read once, and the result is kept.

An index file is a line of JSON (version, the tar's `version_of`, the width of the keys, the number
of samples, and what could not be used) and, after it, the samples as NumPy rows of `row_type`.
It lies beside the tar as `<name>.index` or, where nothing can be written there, in the user's
cache.
"""

import functools
import json
import logging
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mplug_jax.data.files import (
    Place,
    cached_name,
    read_range,
    version_of,
    write_whole,
)
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources.drafts import BadItem, mapping_of, text_of

logger = logging.getLogger(__name__)

FORMAT = 1
PICTURES = ("jpg", "jpeg", "png", "webp")
# Bad samples that an index names; of more only the number.
NAMED = 20
# Index files mapped into memory at a time.
OPEN = 64
BLOCK = 512


@dataclass(frozen=True)
class TarIndex:
    """The index of one tar.

    Attributes:
      shard: path or URL of the tar.
      file: the index file, and `start` the byte in it where its rows begin.
      version: `version_of` the tar when it was read.
      count: samples that have a picture and a caption.
      width: bytes of the longest key.
      bad: samples that lack one, and `bad_samples` (where, reason) of the first of them.
      cut: where and why the tar ended too early, or None.
    """

    shard: str
    file: str
    start: int
    version: str
    count: int
    width: int
    bad: int
    bad_samples: tuple[tuple[str, str], ...]
    cut: str | None

    def sample(self, number: int) -> tuple[str, bytes, str]:
        """Key, picture and caption of a sample, read from the tar.

        Raises:
          BadSample: the tar cannot be read there, or has another content than when it was indexed.
          SourceError: the index file is gone.
        """
        row = _rows(self)[number]
        key = bytes(row["key"]).decode("utf-8", "replace")
        parts = [(int(row[f"{part}_at"]), int(row[f"{part}_size"])) for part in ("image", "text")]
        try:
            image, text = _read_both(self.shard, *parts)
            return key, image, caption_in(text, bool(row["is_json"]))
        except OSError as error:
            raise BadSample(f"{self.shard}/{key}: cannot be read: {error.strerror}") from error
        except BadItem as error:
            raise BadSample(f"{self.shard}/{key}: {error}; did the file change?") from error


@dataclass
class _Sample:
    """The files of one key: (offset, size) of each in the tar."""

    image: tuple[int, int] | None = None
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)


def row_type(width: int) -> np.dtype:
    """A sample: its key, where picture and caption begin, their bytes, and the caption's format."""
    return np.dtype(
        [
            ("key", f"S{width}"),
            *((name, "<i8") for name in ("image_at", "image_size", "text_at", "text_size")),
            ("is_json", "?"),
        ]
    )


def caption_in(content: bytes, is_json: bool) -> str:
    """The caption of a .txt file, or "caption" in a .json file; raises BadItem."""
    try:
        if is_json:
            value = mapping_of(json.loads(content), "the .json file").get("caption")
            caption = text_of(value, "caption (.json)")
        else:
            caption = text_of(content.decode("utf-8-sig"), "the caption (.txt)")
        caption.encode()  # JSON can spell half a character, which tokenizers refuse
    except BadItem:
        raise
    except (ValueError, RecursionError) as error:
        raise BadItem(f"the {'.json' if is_json else '.txt'} file is damaged: {error}") from error
    return caption


def tar_index(shard: Place) -> TarIndex:
    """The index of a tar: the one that is kept, or a new one where there is none or it is old.

    Raises:
      SourceError: the tar cannot be read, is none, or its index can be written nowhere.
    """
    try:
        version = version_of(shard)
        files = [cached_name(shard, ".index")]
        if isinstance(shard, Path):
            files.insert(0, shard.with_name(f"{shard.name}.index"))
        for file in files:
            kept = _kept(shard, file, version)
            if kept is not None:
                return kept
        rows, summary = _indexed(shard)
    except OSError as error:
        raise SourceError(f"{shard}: cannot be read: {error.strerror}") from error
    return _written(shard, files, rows, {"format": FORMAT, "version": version, **summary})


def _kept(shard: Place, file: Path, version: str) -> TarIndex | None:
    """The index in `file`, unless it is missing, damaged, or of another state of the tar."""
    try:
        with open(file, "rb") as opened:
            line = opened.readline()
            size = os.fstat(opened.fileno()).st_size
        summary = json.loads(line)
        if summary.pop("format") != FORMAT or summary["version"] != version:
            return None
        summary["bad_samples"] = tuple((where, why) for where, why in summary["bad_samples"])
        index = TarIndex(str(shard), str(file), len(line), **summary)
        whole = size == len(line) + index.count * row_type(index.width).itemsize
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return index if whole else None


def _written(
    shard: Place, files: list[Path], rows: np.ndarray, summary: dict[str, Any]
) -> TarIndex:
    """Keeps an index in the first of `files` that can be written."""
    line = json.dumps(summary).encode() + b"\n"
    for file in files:
        try:
            write_whole(file, lambda path: Path(path).write_bytes(line + rows.tobytes()))
        except OSError as error:
            refusal = error
            continue
        kept = _kept(shard, file, summary["version"])
        if kept is not None:
            return kept
    raise SourceError(
        f"{shard}: its index cannot be kept in {files[-1].parent}: {refusal.strerror}; make one of "
        "the two folders writable, or name another by XDG_CACHE_HOME"
    )


def _indexed(shard: Place) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows and summary of a tar; raises OSError, and SourceError if it is none."""
    with shard.open("rb") as file:
        samples, cut = _members(file, shard)
        rows: list[tuple[bytes, int, int, int, int, bool]] = []
        bad: list[tuple[str, str]] = []
        for key, sample in samples.items():
            try:
                text, is_json = _caption_place(file, sample)
            except BadItem as error:
                bad.append((f"{shard}/{key}", str(error)))
                continue
            rows.append((key.encode("utf-8", "replace"), *sample.image, *text, is_json))
    width = max((len(row[0]) for row in rows), default=1)
    summary = {"count": len(rows), "width": width, "bad": len(bad)}
    summary |= {"bad_samples": bad[:NAMED], "cut": cut}
    return np.array(rows, row_type(width)), summary


def _members(file: BinaryIO, shard: Place) -> tuple[dict[str, _Sample], str | None]:
    """The tar's files by key, and where it was cut off, if it was."""
    samples: dict[str, _Sample] = {}
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size < BLOCK:
        return samples, f"{shard}: has {size} bytes only"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # or they would all be kept
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    return samples, f"{shard}: is cut off in {member.name}, at byte {size}"
                _add(samples, member)
            end = tar.offset
    except tarfile.TarError as error:
        if not samples:
            raise SourceError(f"{shard}: is no tar file ({error})") from error
        return samples, f"{shard}: is cut off or damaged: {error}"
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        return samples, f"{shard}: is cut off or damaged at byte {end}: no end mark is there"
    return samples, None


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo) -> None:
    """Adds a file to the sample of its key, which is its name up to the first dot."""
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem:
        return
    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
    extension = extension.lower()
    place = (member.offset_data, member.size)
    if extension in PICTURES:
        sample.image = sample.image or place
    elif extension in ("txt", "json"):
        sample.texts.setdefault(extension, place)


def _caption_place(file: BinaryIO, sample: _Sample) -> tuple[tuple[int, int], bool]:
    """Where the caption is, and whether it is in JSON; raises BadItem for an unusable sample."""
    if sample.image is None:
        raise BadItem(f"has no picture (.{', .'.join(PICTURES)})")
    if not sample.image[1]:
        raise BadItem("the picture is empty")
    reasons = []
    for extension in ("txt", "json"):
        if extension in sample.texts:
            offset, size = sample.texts[extension]
            file.seek(offset)
            try:
                caption_in(file.read(size), extension == "json")
            except BadItem as error:
                reasons.append(str(error))
            else:
                return (offset, size), extension == "json"
    raise BadItem("; ".join(reasons) or "has no caption (.txt, or caption in .json)")


@functools.lru_cache(maxsize=OPEN)
def _rows(index: TarIndex) -> np.memmap:
    try:
        return np.memmap(index.file, row_type(index.width), "r", index.start, (index.count,))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{index.file}: the index of {index.shard} cannot be read: {error}; start the run "
            "again, which makes a new one"
        ) from error


def _read_both(shard: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, bytes]:
    """Both files of a sample; at once, since they nearly always lie side by side."""
    start = min(image[0], text[0])
    end = max(image[0] + image[1], text[0] + text[1])
    if end - start > image[1] + text[1] + 2**16:
        return read_range(shard, *image), read_range(shard, *text)
    both = read_range(shard, start, end - start)
    found = [both[at - start : at - start + size] for at, size in (image, text)]
    return found[0], found[1]
