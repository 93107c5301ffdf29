"""RefCOCO, RefCOCO+ and RefCOCOg as REFER publishes them: a file of references in a pickle and
COCO's `instances.json` with the boxes. https://github.com/lichengunc/refer
"""

import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mplug_jax.data.files import Place
from mplug_jax.data.records import Phrase, SourceError
from mplug_jax.data.sources.drafts import (
    BadItem,
    Draft,
    brief,
    corners,
    integer,
    is_key,
    is_number,
    list_of,
    mapping_of,
    read_drafts,
    text_of,
)
from mplug_jax.data.sources.file_records import FileRecords, picture_folder, under_root
from mplug_jax.data.sources.json_reading import Item, read_document, read_items

KEYS = ("ann_id", "image_id", "split", "sentences")


def refer_records(
    path: str | os.PathLike[str],
    instances: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    max_bad_fraction: float = 0.01,
) -> FileRecords:
    """A record for each referring sentence, with the box of what it refers to.

    Args:
      path: `refs(unc).p`, `refs(umd).p` or `refs(google).p`, or the same list as JSON; joined with
        `root` where relative, as are all paths.
      instances: `instances.json`, whose annotations have boxes x, y, width, height in pixels.
      root: config.data.root.
      images: folder of the pictures; None is `root` itself (or, without one, the folder of `path`).
      split: "train", "val", "testA", "testB" (unc) or "test" (umd); None reads all.
      max_bad_fraction: bad sentences tolerated among all.

    Raises:
      SourceError: missing files or folders, files of another kind or with anything but plain data
        in the pickle, no such split, and as `FileRecords`.
    """
    file = under_root(path, root, "file")
    folder = picture_folder(images, root, file)
    references = list(_references(file))
    boxes = _Boxes(under_root(instances, root, "file"))
    if split is not None:
        references = _of_split(references, split, file)
    drafts = read_drafts(_sentences(references), boxes.draft)
    return FileRecords(file, drafts, folder, max_bad_fraction, split)


def _references(path: Place) -> Iterable[Item]:
    with path.open("rb") as file:
        begin = file.read(64).lstrip()
    # No pickle of a list begins like this.
    items = read_items(path) if begin[:1] in (b"[", b"{") else _unpickled(path)
    listed = [] if isinstance(items, dict) else list(items)
    if not any(_is_reference(item.value) for item in listed[:100]):
        raise SourceError(
            f"{path}: is no list of references with the keys {', '.join(KEYS)}, such as REFER's "
            "refs(unc).p"
        )
    return listed


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and all(key in value for key in KEYS)


def _unpickled(path: Place) -> list[Item]:
    try:
        # latin1: the published files are Python 2's.
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    except Exception as error:  # damaged pickles raise whatever their opcodes stumble over
        raise SourceError(
            f"{path}: is neither a pickle nor JSON, or is damaged: {error}"
        ) from error
    listed = content if isinstance(content, list) else []
    return [Item(f"{path}: refs[{index}]", value) for index, value in enumerate(listed)]


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, mappings, texts and numbers; a pickle of anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise SourceError(f"the pickle holds {module}.{name}, not plain data; it is not loaded")


def _of_split(references: list[Item], split: str, path: Place) -> list[Item]:
    found = {item.value.get("split") for item in references if isinstance(item.value, dict)}
    if split not in found:
        raise SourceError(
            f"{path}: has no split {split!r}; it has {', '.join(sorted(map(str, found)))}"
        )
    return [
        item
        for item in references
        if not isinstance(item.value, dict) or item.value.get("split") == split
    ]


def _sentences(references: Iterable[Item]) -> Iterator[Item]:
    """An item (reference, sentence) for each sentence of the references."""
    for item in references:
        sentences = item.value.get("sentences") if isinstance(item.value, dict) else None
        if item.error is not None or not isinstance(sentences, list):
            reason = item.error or f"sentences is {brief(sentences)}, not a list"
            yield Item(item.where, error=reason)
            continue
        for index, sentence in enumerate(sentences):
            yield Item(f"{item.where} sentences[{index}]", (item.value, sentence))


class _Boxes:
    """The pictures and boxes of an `instances.json`, by id."""

    def __init__(self, path: Place):
        document = read_document(path)
        for key in ("images", "annotations"):
            if not isinstance(document.get(key), list):
                raise SourceError(f"{path}: has no list `{key}`, so this is no COCO instances file")
        self._images = _by_id(document["images"])
        self._annotations = _by_id(document["annotations"])

    def draft(self, value: tuple[Mapping[str, Any], Any]) -> Draft:
        """The record of one sentence of a reference; raises BadItem."""
        reference, sentence = value
        sentence = mapping_of(sentence, "a sentence")
        annotation = _named(self._annotations, reference.get("ann_id"), "ann_id")
        image = _named(self._images, reference.get("image_id"), "image_id")
        draft = Draft(text_of(image.get("file_name"), "file_name"), integer(image["id"]))
        box = _fractions(annotation.get("bbox"), image.get("width"), image.get("height"))
        draft.phrases.append(Phrase(phrase=text_of(sentence.get("sent"), "sent"), box=box))
        if is_key(reference.get("ref_id")) and is_key(sentence.get("sent_id")):
            draft.name = f"ref{reference['ref_id']}/sent{sentence['sent_id']}"
        return draft


def _by_id(rows: list[Any]) -> dict[Any, Mapping[str, Any]]:
    return {row["id"]: row for row in rows if isinstance(row, dict) and is_key(row.get("id"))}


def _named(rows: Mapping[Any, Mapping[str, Any]], row_id: Any, what: str) -> Mapping[str, Any]:
    if not is_key(row_id) or row_id not in rows:
        raise BadItem(f"{what} {brief(row_id)} is not in the instances file")
    return rows[row_id]


def _fractions(bbox: Any, width: Any, height: Any) -> list[float]:
    """x, y, width, height in pixels to the corners as fractions of the picture."""
    x, y, box_width, box_height = corners(list_of(bbox, "bbox"))
    if not is_number(width) or not is_number(height) or min(width, height) < 1:
        raise BadItem(f"the picture's size is {brief(width)} x {brief(height)}")
    box = [x / width, y / height, (x + box_width) / width, (y + box_height) / height]
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
    if x1 >= x2 or y1 >= y2:
        raise BadItem(f"box {bbox} has no area within the picture of {width} x {height}")
    return [x1, y1, x2, y2]
