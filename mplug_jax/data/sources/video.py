"""Clips with captions and questions: MSRVTT, MSVD, VATEX, and this project's own rows."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mplug_jax.data.files import RemotePath
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.drafts import (
    BadItem,
    Draft,
    Outcome,
    add_captions,
    asked,
    list_of,
    needed_integer,
    read_drafts,
    text_of,
)
from mplug_jax.data.sources.file_records import FileRecords, picture_folder, under_root
from mplug_jax.data.sources.json_formats import (
    CAPTIONS,
    QUESTIONS,
    Format,
    detect,
    has,
    read_own,
    reader,
)
from mplug_jax.data.sources.json_reading import read_items


def read_msrvtt(item: Mapping[str, Any]) -> Draft:
    """MSRVTT retrieval: `{clip_name, caption}`, caption a text or a list of texts."""
    captions = item["caption"]
    draft = Draft(_name(item["clip_name"], "clip_name"))
    return add_captions(draft, captions if isinstance(captions, list) else [captions])


def read_video_qa(item: Mapping[str, Any]) -> Draft:
    """MSRVTT-QA and MSVD-QA: `{video_id, question, answer, question_id?}`."""
    draft = Draft(_name(item["video_id"], "video_id"))
    draft.questions.append(
        asked(item["question"], item.get("answer", {}), item.get("question_id", item.get("id")))
    )
    return draft


def read_vatex(item: Mapping[str, Any]) -> Draft:
    """VATEX: `{videoID, enCap: [...]}`."""
    draft = Draft(_name(item["videoID"], "videoID"))
    return add_captions(draft, list_of(item["enCap"], "enCap"))


def read_frames(item: Mapping[str, Any]) -> Draft:
    """Clips as lists of pictures: `{video, frames: [path, ...], caption}`, caption a text or a
    list of texts."""
    captions = item["caption"]
    draft = Draft(_name(item["video"], "video"), frames=_frames(item))
    return add_captions(draft, captions if isinstance(captions, list) else [captions])


def read_own_video(item: Mapping[str, Any]) -> Draft:
    """This project's rows: `{video, frames?, captions?, questions?, image_id?}`."""
    draft = read_own({**item, "image": text_of(item["video"], "video")})
    draft.frames = _frames(item) if "frames" in item else []
    return draft


def _frames(item: Mapping[str, Any]) -> list[str]:
    frames = [text_of(frame, "a frame") for frame in list_of(item["frames"], "frames")]
    if not frames:
        raise BadItem("frames is empty")
    return frames


def _name(value: Any, what: str) -> str:
    """Names of clips may be numbers."""
    return str(needed_integer(value, what)) if isinstance(value, int) else text_of(value, what)


def _is_own(item: Any) -> bool:
    own = isinstance(item, dict) and ("captions" in item or "questions" in item)
    return own and "video" in item


VIDEO_FORMATS = (
    Format("MSRVTT retrieval", CAPTIONS, has("clip_name", "caption"), read_msrvtt),
    Format("video QA", QUESTIONS, has("video_id", "question"), read_video_qa),
    Format("VATEX", CAPTIONS, has("videoID", "enCap"), read_vatex),
    Format("clips of listed frames", CAPTIONS, has("video", "frames", "caption"), read_frames),
    Format("JSON lines of this project", CAPTIONS | QUESTIONS, _is_own, read_own_video),
)


def video_records(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    extension: str = ".mp4",
    max_bad_fraction: float = 0.01,
) -> FileRecords:
    """A record for each clip, with all captions and questions the file has of it.

    Args:
      path: the annotation file, in any format of VIDEO_FORMATS; joined with `root` where relative.
      root: config.data.root.
      videos: folder of the clips, joined with `root` where relative; None is `root` itself (or,
        without a root, the annotation file's folder).
      extension: what the clips' file names end in, where the file names them without. A clip
        without a file but with a folder of its name is that folder of frames.
      max_bad_fraction: bad rows tolerated among all.

    Raises:
      SourceError: missing files or folders, no JSON, an unknown format, and as `FileRecords`.
    """
    file = under_root(path, root, "file")
    folder = picture_folder(videos, root, file)
    if isinstance(folder, RemotePath):
        raise SourceError(
            f"{folder}: clips are read from local disks only; copy the folder to one, and name it "
            "with the source's `videos`"
        )
    content = read_items(file)
    if isinstance(content, dict):
        raise SourceError(
            f"{file}: is one object with {', '.join(content)}, not a list of "
            f"{', '.join(form.name for form in VIDEO_FORMATS)}"
        )
    items, form = detect(content, file, VIDEO_FORMATS)
    place = functools.partial(_clip_path, folder, extension=extension)
    drafts = _by_clip(read_drafts(items, reader(form)), place)
    return FileRecords(file, drafts, folder, max_bad_fraction, folder_key="videos")


def _clip_path(folder: Path, name: str, extension: str) -> str:
    """The first that is there of: file `name.mp4`, file `name`, folder `name` without `.mp4`.

    The questions of MSRVTT-QA and MSVD-QA as published number the clips (6513), whose files are
    called `video6513.mp4` and `vid6513.avi`.
    """
    stem = name.removesuffix(extension)
    prefixes = ("", "video", "vid") if stem.isdecimal() else ("",)
    for prefix in prefixes:
        for path in (prefix + stem + extension, prefix + name, prefix + stem):
            if (folder / path).exists():
                return path
    return stem + extension


def _by_clip(
    drafts: Iterable[tuple[str, Outcome]], place: Callable[[str], str]
) -> Iterator[tuple[str, Outcome]]:
    """Drafts of the same clip made one, where the first of them stood; bad items as they come."""
    clips: dict[str, tuple[str, Draft]] = {}
    for where, outcome in drafts:
        if not isinstance(outcome, Draft):
            yield where, outcome
            continue
        if not (outcome.captions or outcome.questions):
            yield where, BadItem("has no captions and no questions")
            continue
        if outcome.image not in clips:
            clips[outcome.image] = (where, outcome)
            continue
        draft = clips[outcome.image][1]
        draft.captions += outcome.captions
        draft.questions += outcome.questions
        draft.complaints += outcome.complaints
    for name, (where, draft) in clips.items():
        draft.image, draft.is_video = draft.frames[0] if draft.frames else place(name), True
        draft.name = name
        yield where, draft
