"""The source of annotation files with a folder of images, in any format of `json_formats`."""

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mplug_jax.data.records import BadSample, Record, SourceError
from mplug_jax.data.sources.json_formats import (
    FORMATS,
    OWN,
    RETRIEVAL,
    SENTENCES,
    BadItem,
    Draft,
    Format,
    coco_items,
    read_transvg,
)
from mplug_jax.data.sources.json_reading import Item, read_items

logger = logging.getLogger(__name__)

# What the records of each kind of source must have; None: any of it.
KIND_HOLDS = {
    "captions": "captions",
    "retrieval": "captions",
    "vqa": "questions",
    "grounding": "phrases",
    "jsonl": None,
}
BOX_FORMATS = ("xywh", "xyxy")
# Bad records logged one by one; of more only the number.
LOGGED = 20
# Pictures looked for when a source is built.
PICTURES_CHECKED = 8


class JsonRecords:
    """Records of one annotation file; pictures stay paths until an example is made.

    Args:
      path: the annotation file; joined with `root` where relative.
      kind: what its records must have: "captions" and "retrieval" captions, "vqa" questions,
        "grounding" phrases; "jsonl" reads this project's own schema, whatever it holds.
      root: config.data.root.
      images: folder that the file's image paths start from, joined with `root` where relative;
        None is `root` itself (or, without a root, the annotation file's folder).
      split: of Karpathy's files: "train" (with "restval"), "val", "test"; None reads all.
      box_format: of TransVG's tuples: "xywh", or "xyxy" (its referit and flickr files).
      max_bad_fraction: bad records tolerated among all.

    Attributes:
      bad_records: (where, reason) of every item left out, or of captions left out of an item.

    Raises:
      ValueError: an unknown kind or box format.
      SourceError: missing files or folders, no JSON, an unknown format or one without what `kind`
        needs, no records, too many bad ones, no picture where the first are looked for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str = "captions",
        root: str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        split: str | None = None,
        box_format: str = "xywh",
        max_bad_fraction: float = 0.01,
    ):
        if kind not in KIND_HOLDS:
            raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KIND_HOLDS)}")
        if box_format not in BOX_FORMATS:
            raise ValueError(f"box_format is {box_format!r}; choose from {', '.join(BOX_FORMATS)}")
        self._path = _under_root(path, root, "file")
        folder = images if images is not None else (root or self._path.parent)
        self._images = os.path.normpath(_under_root(folder, root, "folder"))
        self.bad_records: list[tuple[str, str]] = []
        self._lines: list[bytes] = []
        self._ids = np.zeros(0, np.int32)
        self._load(kind, split, box_format)
        self._judge(max_bad_fraction, split)
        self._find_pictures()

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"JsonRecords({str(self._path)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where a box in pixels needs a picture that cannot be opened."""
        stored = json.loads(self._lines[index])
        pixel_boxes = stored.pop("pixel_boxes", False)
        record: Record = {
            **stored,
            "image": os.path.join(self._images, stored["image"]),
            "image_id": int(self._ids[index]),
        }
        if pixel_boxes:
            width, height = _picture_size(record["image"])
            for phrase in record["phrases"]:
                scaled = np.array(phrase["box"]) / [width, height, width, height]
                phrase["box"] = scaled.clip(0.0, 1.0).tolist()
        return record

    def _load(self, kind: str, split: str | None, box_format: str) -> None:
        items, form = _items_and_format(self._path, kind, split)
        read = form.read
        if read is read_transvg:
            read = functools.partial(read_transvg, box_format=box_format)
        needed = KIND_HOLDS[kind]
        given_ids: list[int | None] = []
        numbers: dict[str, int] = {}
        seen: dict[str, int] = {}
        image_numbers: list[int] = []
        for item in items:
            try:
                draft = self._draft(item, form, read, needed)
            except BadItem as error:
                self.bad_records.append((item.where, str(error)))
                continue
            self.bad_records += [(item.where, reason) for reason in draft.complaints]
            times = seen[draft.image] = seen.get(draft.image, 0) + 1
            name = draft.image if times == 1 else f"{draft.image}#{times}"
            self._lines.append(_stored(draft, name))
            given_ids.append(draft.image_id)
            image_numbers.append(numbers.setdefault(draft.image, len(numbers)))
        # One missing id, and the file's own could clash with ours: number the pictures instead.
        ids = image_numbers if None in given_ids else given_ids
        self._ids = np.array(ids, np.int32)

    def _draft(
        self, item: Item, form: Format, read: Callable[[Any], Draft], needed: str | None
    ) -> Draft:
        if item.error is not None:
            raise BadItem(item.error)
        if not form.recognises(item.value):
            keys = f"keys {sorted(item.value)}" if isinstance(item.value, dict) else item.value
            raise BadItem(f"is not of the file's format ({form.name}): {keys!s:.120}")
        draft = read(item.value)
        if needed is not None and not getattr(draft, needed):
            raise BadItem(f"has no {needed}")
        path = os.path.normpath(os.path.join(self._images, draft.image))
        if not path.startswith(os.path.join(self._images, "")):
            raise BadItem(f"image {draft.image!r} lies outside the folder {self._images}")
        draft.image = os.path.relpath(path, self._images)
        return draft

    def _judge(self, max_bad_fraction: float, split: str | None) -> None:
        """Logs the bad records, and raises if there are too many or no good ones."""
        bad, total = len(self.bad_records), len(self.bad_records) + len(self)
        for where, reason in self.bad_records[:LOGGED]:
            logger.warning("%s: skipped: %s", where, reason)
        if bad:
            logger.warning("%s: %d bad of %d records", self._path, bad, total)
        first = "; ".join(f"{where}: {reason}" for where, reason in self.bad_records[:3])
        if not len(self):
            chosen = "" if split is None else f" in split {split!r}"
            raise SourceError(f"{self._path}: no usable records{chosen}. {first}".rstrip())
        if bad > max_bad_fraction * total:
            raise SourceError(
                f"{self._path}: {bad} of {total} records are bad, more than "
                f"data.max_bad_fraction={max_bad_fraction} allows. The first: {first}"
            )

    def _find_pictures(self) -> None:
        checked = range(0, len(self), -(-len(self) // PICTURES_CHECKED))
        names = [json.loads(self._lines[index])["image"] for index in checked]
        paths = [os.path.join(self._images, name) for name in names]
        if not any(os.path.exists(path) for path in paths):
            raise SourceError(
                f"{self._path}: none of the pictures looked for is there, such as {paths[0]}; "
                "check config.data.root and the source's `images` folder"
            )


def _under_root(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, what: str
) -> Path:
    """`path` joined with `root`, existing and of the right sort."""
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


def _items_and_format(path: Path, kind: str, split: str | None) -> tuple[Iterable[Item], Format]:
    content = read_items(path)
    if isinstance(content, Mapping):
        items, form, has_splits = _object_items(content, path)
    else:
        items, form = _detected(content, path)
        has_splits = False
    if split is not None:
        items = _of_split(items, split, path, has_splits)
    needed = KIND_HOLDS[kind]
    if (needed is not None and needed not in form.holds) or (kind == "jsonl" and form is not OWN):
        fitting = [name for name, holds in KIND_HOLDS.items() if holds in form.holds]
        raise SourceError(
            f"{path}: looks like the format {form.name!r}, which a {kind!r} source cannot read; "
            f"use kind {' or '.join(map(repr, fitting))}"
        )
    return items, form


def _object_items(document: Mapping[str, Any], path: Path) -> tuple[Iterable[Item], Format, bool]:
    """Items, format and whether there are splits, of Karpathy's and COCO's objects."""
    if "annotations" in document:
        if not isinstance(document["annotations"], list):
            raise SourceError(f"{path}: annotations is no list, so this is no COCO caption file")
        return coco_items(document, str(path)), RETRIEVAL, False
    items = [Item(f"{path}: images[{i}]", v) for i, v in enumerate(document["images"])]
    if not any(SENTENCES.recognises(item.value) for item in items[:LOGGED]):
        raise SourceError(
            f"{path}: has images, but neither annotations (COCO) nor sentences (Karpathy)"
        )
    return items, SENTENCES, True


def _detected(items: Iterator[Item], path: Path) -> tuple[Iterable[Item], Format]:
    """The format that an item among the first is recognised as, and all items."""
    first = list(itertools.islice(items, 100))
    if not first:
        raise SourceError(f"{path}: the list is empty")
    for item in first:
        for form in FORMATS:
            if form.recognises(item.value):
                return itertools.chain(first, items), form
    found = first[0].error or (
        f"keys {', '.join(map(str, first[0].value))}"
        if isinstance(first[0].value, dict)
        else f"{first[0].value!r:.80}"
    )
    raise SourceError(
        f"{path}: the format is none of {', '.join(form.name for form in FORMATS)}; "
        f"{first[0].where} has: {found}"
    )


def _of_split(items: Iterable[Item], split: str, path: Path, has_splits: bool) -> Iterator[Item]:
    if not has_splits:
        raise SourceError(
            f"{path}: has no splits (only Karpathy's files do); leave out split={split!r}"
        )
    wanted = {"train", "restval"} if split == "train" else {split}
    listed = list(items)
    found = {item.value.get("split") for item in listed if isinstance(item.value, dict)}
    if not wanted & found:
        raise SourceError(
            f"{path}: has no split {split!r}; it has {', '.join(sorted(map(str, found)))}"
        )
    return (
        item
        for item in listed
        if not isinstance(item.value, dict) or item.value.get("split") in wanted
    )


def _stored(draft: Draft, name: str) -> bytes:
    """A record as JSON: a tenth of the memory of Python objects, and quick to send to workers."""
    record: dict[str, Any] = {"id": name, "image": draft.image, "captions": draft.captions}
    if draft.questions:
        record["questions"] = draft.questions
    if draft.phrases:
        record["phrases"] = draft.phrases
    if draft.pixel_boxes:
        record["pixel_boxes"] = True
    return json.dumps(record, ensure_ascii=False).encode()


def _picture_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: cannot be opened for its size: {error}") from error
