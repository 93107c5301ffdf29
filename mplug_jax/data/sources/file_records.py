"""The records of annotation files: what every source that reads files keeps and hands out."""

import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mplug_jax.data.files import Place, RemotePath, is_remote, joined, place
from mplug_jax.data.records import BadSample, Record, SourceError
from mplug_jax.data.sources.drafts import BadItem, Draft, Outcome

logger = logging.getLogger(__name__)

# Bad records logged one by one; of more only the number.
LOGGED = 20
# Pictures looked for when a source is built.
PICTURES_CHECKED = 8
# What a stored record has of its draft, where the draft has it.
OPTIONAL = (
    "questions",
    "phrases",
    "pair",
    "entailment",
    "domain",
    "pixel_boxes",
    "is_video",
    "frames",
)


class FileRecords:
    """Records of one annotation file; pictures stay paths until an example is made.

    Args:
      path: the annotation file, for messages.
      drafts: (where, outcome) of each of its items, as `drafts.read_drafts` makes them.
      folder: what the pictures' paths start from.
      max_bad_fraction: bad records tolerated among all.
      split: the part of the file that was asked for, for messages.
      folder_key: the spec's key that names the folder, for messages.

    Attributes:
      bad_records: (where, reason) of every item left out, or of captions left out of an item.
      left_out: number of items that the data set itself marks as not to be used.

    Raises:
      SourceError: no records, too many bad ones, no picture where the first are looked for.
    """

    def __init__(
        self,
        path: Place,
        drafts: Iterable[tuple[str, Outcome]],
        folder: Place,
        max_bad_fraction: float = 0.01,
        split: str | None = None,
        folder_key: str = "images",
    ):
        self._path = path
        remote = isinstance(folder, RemotePath)
        self._folder = folder.url.rstrip("/") if remote else os.path.abspath(folder)
        # Without the scheme, whose "//" would not outlive os.path.normpath.
        self._top = os.path.join(self._folder.rpartition("://")[2], "")
        self.bad_records: list[tuple[str, str]] = []
        self.left_out = 0
        self._lines: list[bytes] = []
        self._ids = np.zeros(0, np.int32)
        self._load(drafts)
        check_bad(path, len(self), self.bad_records, max_bad_fraction, split=split)
        if self.left_out:
            logger.info("%s: %d rows without a label left out", path, self.left_out)
        self._find_pictures(folder_key)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"FileRecords({str(self._path)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where a box in pixels lies outside its picture, or needs one that cannot
        be opened."""
        stored = json.loads(self._lines[index])
        pixel_boxes = stored.pop("pixel_boxes", False)
        is_video = stored.pop("is_video", False)
        frames = [os.path.join(self._folder, frame) for frame in stored.pop("frames", ())]
        record: Record = {
            **stored,
            "image": os.path.join(self._folder, stored["image"]),
            "image_id": int(self._ids[index]),
        }
        if is_video:
            record["video"] = frames or record["image"]
        if "pair" in record:
            record["pair"]["image2"] = os.path.join(self._folder, record["pair"]["image2"])
        if pixel_boxes:
            width, height = _picture_size(record["image"])
            for phrase in record["phrases"]:
                scaled = np.array(phrase["box"]) / [width, height, width, height]
                x1, y1, x2, y2 = phrase["box"] = scaled.clip(0.0, 1.0).tolist()
                if x1 >= x2 or y1 >= y2:
                    raise BadSample(
                        f"{record['id']}: a box lies outside its picture of {width}x{height} pixels"
                    )
        return record

    def _load(self, drafts: Iterable[tuple[str, Outcome]]) -> None:
        given_ids: list[int | None] = []
        numbers: dict[str, int] = {}
        seen: dict[str, int] = {}
        image_numbers: list[int] = []
        for where, outcome in drafts:
            try:
                draft = self._usable(outcome)
                line = b"" if draft is None else _stored(draft, _unique(draft, seen))
            except BadItem as error:
                self.bad_records.append((where, str(error)))
                continue
            if draft is None:
                self.left_out += 1
                continue
            self.bad_records += [(where, reason) for reason in draft.complaints]
            self._lines.append(line)
            given_ids.append(draft.image_id)
            image_numbers.append(numbers.setdefault(draft.image, len(numbers)))
        # One missing id, and the file's own could clash with ours: number the pictures instead.
        ids = image_numbers if None in given_ids else given_ids
        self._ids = np.array(ids, np.int32)

    def _usable(self, outcome: Outcome) -> Draft | None:
        """The draft with its paths made plain; raises BadItem."""
        if isinstance(outcome, BadItem):
            raise outcome
        if outcome is not None:
            outcome.image = self._inside(outcome.image)
            outcome.frames = [self._inside(frame) for frame in outcome.frames]
            if outcome.pair is not None:
                outcome.pair["image2"] = self._inside(outcome.pair["image2"])
        return outcome

    def _inside(self, image: str) -> str:
        path = os.path.normpath(os.path.join(self._top, image))
        if not path.startswith(self._top):
            raise BadItem(f"image {image!r} lies outside the folder {self._folder}")
        return path.removeprefix(self._top)

    def _find_pictures(self, folder_key: str) -> None:
        checked = range(0, len(self), -(-len(self) // PICTURES_CHECKED))
        names = [json.loads(self._lines[index])["image"] for index in checked]
        paths = [os.path.join(self._folder, name) for name in names]
        if not any(map(_exists, paths)):
            what = "pictures" if folder_key == "images" else folder_key
            raise SourceError(
                f"{self._path}: none of the {what} looked for is there, such as {paths[0]}; "
                f"check config.data.root and the source's `{folder_key}` folder"
            )


def _exists(path: str) -> bool:
    # Unlike pathlib's, this says no to names that no file can have, such as those too long.
    return place(path).exists() if is_remote(path) else os.path.exists(path)


def check_bad(
    path: Place,
    good: int,
    bad_records: Sequence[tuple[str, str]],
    max_bad_fraction: float,
    bad: int | None = None,
    split: str | None = None,
) -> None:
    """Logs the bad records of a source.

    Args:
      path: of the source, for messages.
      good: number of usable records.
      bad_records: (where, reason) of bad ones.
      max_bad_fraction: bad records tolerated among all.
      bad: their number, where `bad_records` does not hold all.
      split: the part of the file that was asked for, for messages.

    Raises:
      SourceError: too many are bad, or none is good.
    """
    bad = len(bad_records) if bad is None else bad
    for where, reason in bad_records[:LOGGED]:
        logger.warning("%s: skipped: %s", where, reason)
    if bad:
        logger.warning("%s: %d bad of %d records", path, bad, good + bad)
    first = "; ".join(f"{where}: {reason}" for where, reason in bad_records[:3])
    if not good:
        chosen = "" if split is None else f" in split {split!r}"
        raise SourceError(f"{path}: no usable records{chosen}. {first}".rstrip())
    if bad > max_bad_fraction * (good + bad):
        raise SourceError(
            f"{path}: {bad} of {good + bad} records are bad, more than "
            f"data.max_bad_fraction={max_bad_fraction} allows. The first: {first}"
        )


def rooted(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Place:
    """`path` joined with `root` where relative, there or not.

    Raises:
      SourceError: there is no such root.
    """
    below = root and not (is_remote(path) or os.path.isabs(path))
    if below and not place(root).is_dir():
        raise SourceError(f"config.data.root is {str(root)!r}: there is no such folder")
    return joined(path, root)


def under_root(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, what: str
) -> Place:
    """`path` joined with `root` where relative: an existing "file" or "folder", as `what` says.

    Raises:
      SourceError: there is none.
    """
    whole = rooted(path, root)
    if whole.is_file() if what == "file" else whole.is_dir():
        return whole
    raise SourceError(f"there is no {what} {named_in_config(whole, path, root)}")


def named_in_config(
    whole: Place, path: str | os.PathLike[str], root: str | os.PathLike[str] | None
) -> str:
    """A path as messages show one that is not there: whole, and what it was made of."""
    shown = whole if whole.is_absolute() else whole.absolute()
    hint = f"config.data.root is {None if root is None else str(root)!r}"
    return f"{shown} (the config names {str(path)!r}; {hint})"


def picture_folder(
    folder: str | os.PathLike[str] | None, root: str | os.PathLike[str] | None, file: Place
) -> Place:
    """`folder` under `root`; None is `root` itself or, without a root, the folder of `file`."""
    if folder is None and not root:
        return file.parent
    return under_root(folder or "", root, "folder")


def _stored(draft: Draft, name: str) -> bytes:
    """A record as JSON: a tenth of the memory of Python objects, and quick to send to workers."""
    record: dict[str, Any] = {"id": name, "image": draft.image, "captions": draft.captions}
    record.update({key: value for key in OPTIONAL if (value := getattr(draft, key))})
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise BadItem(f"a text holds {half}, half a character (a lone surrogate)") from error


def _unique(draft: Draft, seen: dict[str, int]) -> str:
    """What the record is called: the first by its name, others of the name with a number."""
    name = draft.name or draft.image
    times = seen[name] = seen.get(name, 0) + 1
    return name if times == 1 else f"{name}#{times}"


def _picture_size(path: str) -> tuple[int, int]:
    try:
        file = io.BytesIO(RemotePath(path).read_bytes()) if is_remote(path) else path
        with Image.open(file) as picture:
            return picture.size
    except SourceError:
        raise
    except Exception as error:  # as in `decode_image`: Pillow raises whatever it stumbles over
        raise BadSample(f"{path}: cannot be opened for its size: {error}") from error
