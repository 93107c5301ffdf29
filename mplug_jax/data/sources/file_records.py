"""The records of annotation files: what every source that reads files keeps and hands out."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mplug_jax.data.records import BadSample, Record, SourceError
from mplug_jax.data.sources.drafts import BadItem, Draft, Outcome

logger = logging.getLogger(__name__)

# Bad records logged one by one; of more only the number.
LOGGED = 20
# Pictures looked for when a source is built.
PICTURES_CHECKED = 8
# What a stored record has of its draft, where the draft has it.
OPTIONAL = ("questions", "phrases", "pair", "entailment", "domain", "pixel_boxes", "is_video")


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
        path: Path,
        drafts: Iterable[tuple[str, Outcome]],
        folder: Path,
        max_bad_fraction: float = 0.01,
        split: str | None = None,
        folder_key: str = "images",
    ):
        self._path = path
        self._folder = os.path.abspath(folder)
        self._beginning = os.path.join(self._folder, "")
        self.bad_records: list[tuple[str, str]] = []
        self.left_out = 0
        self._lines: list[bytes] = []
        self._ids = np.zeros(0, np.int32)
        self._load(drafts)
        self._judge(max_bad_fraction, split)
        self._find_pictures(folder_key)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"FileRecords({str(self._path)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where a box in pixels needs a picture that cannot be opened."""
        stored = json.loads(self._lines[index])
        pixel_boxes = stored.pop("pixel_boxes", False)
        is_video = stored.pop("is_video", False)
        record: Record = {
            **stored,
            "image": os.path.join(self._folder, stored["image"]),
            "image_id": int(self._ids[index]),
        }
        if is_video:
            record["video"] = record["image"]
        if "pair" in record:
            record["pair"]["image2"] = os.path.join(self._folder, record["pair"]["image2"])
        if pixel_boxes:
            width, height = _picture_size(record["image"])
            for phrase in record["phrases"]:
                scaled = np.array(phrase["box"]) / [width, height, width, height]
                phrase["box"] = scaled.clip(0.0, 1.0).tolist()
        return record

    def _load(self, drafts: Iterable[tuple[str, Outcome]]) -> None:
        given_ids: list[int | None] = []
        numbers: dict[str, int] = {}
        seen: dict[str, int] = {}
        image_numbers: list[int] = []
        for where, outcome in drafts:
            try:
                draft = self._usable(outcome)
            except BadItem as error:
                self.bad_records.append((where, str(error)))
                continue
            if draft is None:
                self.left_out += 1
                continue
            self.bad_records += [(where, reason) for reason in draft.complaints]
            name = draft.name or draft.image
            times = seen[name] = seen.get(name, 0) + 1
            self._lines.append(_stored(draft, name if times == 1 else f"{name}#{times}"))
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
            if outcome.pair is not None:
                outcome.pair["image2"] = self._inside(outcome.pair["image2"])
        return outcome

    def _inside(self, image: str) -> str:
        path, folder = os.path.normpath(os.path.join(self._folder, image)), self._beginning
        if not path.startswith(folder):
            raise BadItem(f"image {image!r} lies outside the folder {self._folder}")
        return path.removeprefix(folder)

    def _judge(self, max_bad_fraction: float, split: str | None) -> None:
        """Logs the bad records, and raises if there are too many or no good ones."""
        bad, total = len(self.bad_records), len(self.bad_records) + len(self)
        for where, reason in self.bad_records[:LOGGED]:
            logger.warning("%s: skipped: %s", where, reason)
        if bad:
            logger.warning("%s: %d bad of %d records", self._path, bad, total)
        if self.left_out:
            logger.info("%s: %d rows without a label left out", self._path, self.left_out)
        first = "; ".join(f"{where}: {reason}" for where, reason in self.bad_records[:3])
        if not len(self):
            chosen = "" if split is None else f" in split {split!r}"
            raise SourceError(f"{self._path}: no usable records{chosen}. {first}".rstrip())
        if bad > max_bad_fraction * total:
            raise SourceError(
                f"{self._path}: {bad} of {total} records are bad, more than "
                f"data.max_bad_fraction={max_bad_fraction} allows. The first: {first}"
            )

    def _find_pictures(self, folder_key: str) -> None:
        checked = range(0, len(self), -(-len(self) // PICTURES_CHECKED))
        names = [json.loads(self._lines[index])["image"] for index in checked]
        paths = [os.path.join(self._folder, name) for name in names]
        if not any(os.path.exists(path) for path in paths):
            what = "pictures" if folder_key == "images" else folder_key
            raise SourceError(
                f"{self._path}: none of the {what} looked for is there, such as {paths[0]}; "
                f"check config.data.root and the source's `{folder_key}` folder"
            )


def under_root(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, what: str
) -> Path:
    """`path` joined with `root` where relative: an existing "file" or "folder", as `what` says.

    Raises:
      SourceError: there is none.
    """
    whole = Path(path)
    if not whole.is_absolute() and root is not None:
        if not Path(root).is_dir():
            raise SourceError(f"config.data.root is {str(root)!r}: there is no such folder")
        whole = Path(root) / whole
    if whole.is_file() if what == "file" else whole.is_dir():
        return whole
    hint = f"config.data.root is {None if root is None else str(root)!r}"
    if not whole.is_absolute():
        whole = whole.absolute()
    raise SourceError(f"there is no {what} {whole} (the config names {str(path)!r}; {hint})")


def picture_folder(
    folder: str | os.PathLike[str] | None, root: str | os.PathLike[str] | None, file: Path
) -> Path:
    """`folder` under `root`; None is `root` itself or, without a root, the folder of `file`."""
    return under_root(folder if folder is not None else (root or file.parent), root, "folder")


def _stored(draft: Draft, name: str) -> bytes:
    """A record as JSON: a tenth of the memory of Python objects, and quick to send to workers."""
    record: dict[str, Any] = {"id": name, "image": draft.image, "captions": draft.captions}
    record.update({key: value for key in OPTIONAL if (value := getattr(draft, key))})
    return json.dumps(record, ensure_ascii=False).encode()


def _picture_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: cannot be opened for its size: {error}") from error
