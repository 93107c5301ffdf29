"""The source of annotation files with a folder of images, in any format of `json_formats`."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mplug_jax.data.files import Place
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.drafts import Draft, Reader, read_drafts
from mplug_jax.data.sources.file_records import FileRecords, picture_folder, under_root
from mplug_jax.data.sources.json_formats import (
    FORMATS,
    OWN,
    RETRIEVAL,
    SENTENCES,
    VQA_V2,
    Format,
    coco_items,
    detect,
    reader,
)
from mplug_jax.data.sources.json_reading import Item, read_items
from mplug_jax.data.sources.vqa import (
    SoftLabels,
    add_soft_labels,
    read_annotations,
    read_soft_labels,
    vqa_v2_items,
)

# What the records of each kind of source must have; None: any of it.
KIND_HOLDS = {
    "captions": "captions",
    "retrieval": "captions",
    "vqa": "questions",
    "grounding": "phrases",
    "nlvr2": "pair",
    "snli_ve": "entailment",
    "jsonl": None,
}
BOX_FORMATS = ("xywh", "xyxy")
# Items looked at to tell Karpathy's object from others.
LOOKED_AT = 20


def json_records(
    path: str | os.PathLike[str],
    kind: str = "captions",
    root: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    box_format: str | None = None,
    annotations: str | os.PathLike[str] | None = None,
    image_name: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> FileRecords:
    """The records of an annotation file in JSON.

    Args:
      path: the annotation file; joined with `root` where relative, as are all paths.
      kind: what its records must have: "captions" and "retrieval" captions, "vqa" questions,
        "grounding" phrases, "nlvr2" a pair, "snli_ve" an entailment; "jsonl" reads this project's
        own schema, whatever it holds.
      root: config.data.root.
      images: folder that the file's image paths start from; None is `root` itself (or, without a
        root, the annotation file's folder).
      split: of Karpathy's files: "train" (with "restval"), "val", "test"; None reads all.
      box_format: of TransVG's tuples: "xywh" (as None), or "xyxy" (its referit and flickr files).
      annotations: the file with the answers to VQA v2's questions.
      image_name: of VQA v2 and Visual Genome, the name of picture `image_id` as a format, such as
        "COCO_train2014_{image_id:012d}.jpg".
      labels: file of soft labels for the questions.
      max_bad_fraction: bad records tolerated among all.

    Raises:
      ValueError: an unknown kind or box format, or a format that is none.
      SourceError: missing files or folders, no JSON, an unknown format or one without what `kind`
        needs or without a use for an option, and as `FileRecords`.
    """
    if kind not in KIND_HOLDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KIND_HOLDS)}")
    if box_format not in (None, *BOX_FORMATS):
        raise ValueError(f"box_format is {box_format!r}; choose from {', '.join(BOX_FORMATS)}")
    _check_image_name(image_name)
    file = under_root(path, root, "file")
    folder = picture_folder(images, root, file)
    items, form = _items_and_format(file, kind, split)
    options: dict[str, Any] = {
        "box_format": box_format,
        "image_name": image_name,
        "annotations": annotations,
    }
    options = {key: value for key, value in options.items() if value is not None}
    for key in sorted(options.keys() - form.options):
        raise SourceError(f"{file}: has the format {form.name!r}, which has no use for {key!r}")
    if "annotations" in options:
        options["annotations"] = read_annotations(under_root(annotations, root, "file"))
    read = reader(form, KIND_HOLDS[kind], **options)
    if labels is not None:
        read = _with_labels(read, read_soft_labels(under_root(labels, root, "file")))
    return FileRecords(file, read_drafts(items, read), folder, max_bad_fraction, split)


def _check_image_name(image_name: str | None) -> None:
    try:
        if image_name is None or image_name.format(image_id=1) != image_name.format(image_id=2):
            return
    except (LookupError, ValueError, AttributeError, TypeError):
        pass
    raise ValueError(
        f"image_name is {image_name!r}, not a format of image_id such as "
        "'COCO_train2014_{image_id:012d}.jpg'"
    )


def _with_labels(read: Reader, labels: SoftLabels) -> Reader:
    def labelled(value: Any) -> Draft | None:
        draft = read(value)
        return None if draft is None else add_soft_labels(draft, labels)

    return labelled


def _items_and_format(path: Place, kind: str, split: str | None) -> tuple[Iterable[Item], Format]:
    content = read_items(path)
    if isinstance(content, Mapping):
        items, form, has_splits = _document_items(content, path)
    else:
        items, form = detect(content, path, FORMATS)
        has_splits = False
    if split is not None:
        items = _of_split(items, split, path, has_splits)
    if form.parts is not None:
        items = (part for item in items for part in form.parts(item))
    needed = KIND_HOLDS[kind]
    if (needed is not None and needed not in form.holds) or (kind == "jsonl" and form is not OWN):
        fitting = [name for name, holds in KIND_HOLDS.items() if holds in form.holds]
        raise SourceError(
            f"{path}: looks like the format {form.name!r}, which a {kind!r} source cannot read; "
            f"use kind {' or '.join(map(repr, fitting))}"
        )
    return items, form


def _document_items(
    document: Mapping[str, Any], path: Place
) -> tuple[Iterable[Item], Format, bool]:
    """Items, format and whether there are splits, of VQA v2's, COCO's and Karpathy's objects."""
    for key in ("questions", "images", "annotations"):
        if not isinstance(document.get(key, []), list):
            raise SourceError(f"{path}: {key} is no list, so this is no annotation file")
    if "questions" in document:
        return vqa_v2_items(document, str(path)), VQA_V2, False
    if "images" not in document:
        raise SourceError(
            f"{path}: has annotations, but neither images (COCO) nor questions (VQA v2); of VQA "
            "v2, `path` is the file of questions, and `annotations` this one"
        )
    if "annotations" in document:
        return coco_items(document, str(path)), RETRIEVAL, False
    items = [Item(f"{path}: images[{i}]", v) for i, v in enumerate(document["images"])]
    if not any(SENTENCES.recognises(item.value) for item in items[:LOOKED_AT]):
        raise SourceError(
            f"{path}: has images, but neither annotations (COCO) nor sentences (Karpathy)"
        )
    return items, SENTENCES, True


def _of_split(items: Iterable[Item], split: str, path: Place, has_splits: bool) -> Iterator[Item]:
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
