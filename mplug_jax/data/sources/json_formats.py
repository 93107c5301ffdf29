"""The published annotation formats of pictures: found by what an item looks like.

A reader turns one item into a `Draft` or raises `BadItem` with the reason. `docs/data.md` shows
every format.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mplug_jax.data.files import Place
from mplug_jax.data.records import Phrase, SourceError
from mplug_jax.data.sources import nlvr2, snli_ve, vqa
from mplug_jax.data.sources.drafts import (
    BadItem,
    Draft,
    Reader,
    add_captions,
    asked,
    brief,
    corners,
    integer,
    is_key,
    list_of,
    mapping_of,
    needed_integer,
    phrase_of,
    text_of,
)
from mplug_jax.data.sources.json_reading import Item


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
      name: for messages.
      holds: which fields of a draft its records can have.
      recognises: whether an item is of this format.
      read: item to draft.
      options: the keys of a spec that `read` takes.
      parts: the items that become records, where one item of the file holds several.
    """

    name: str
    holds: frozenset[str]
    recognises: Callable[[Any], bool]
    read: Callable[..., Draft | None]
    options: frozenset[str] = field(default=frozenset())
    parts: Callable[[Item], Iterator[Item]] | None = None


def read_retrieval(item: Mapping[str, Any]) -> Draft:
    """Official retrieval: `{image, caption, image_id}`, caption a text or a list of texts."""
    captions = item["caption"]
    draft = Draft(text_of(item.get("image"), "image"), integer(item.get("image_id")))
    if isinstance(item.get("domain"), str):
        draft.domain = item["domain"]
    return add_captions(draft, captions if isinstance(captions, list) else [captions])


def read_sentences(item: Mapping[str, Any]) -> Draft:
    """Official caption and Karpathy: `{filename, filepath?, sentences: [{raw}], cocoid?}`."""
    name = text_of(item.get("filename"), "filename")
    folder = item.get("filepath") or ""
    if not isinstance(folder, str):
        raise BadItem(f"filepath is {brief(folder)}, not a text")
    sentences = list_of(item["sentences"], "sentences")
    raw = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    image_id = integer(item.get("cocoid", item.get("imgid")))
    return add_captions(Draft(os.path.join(folder, name), image_id), raw)


def read_grounding(item: Mapping[str, Any]) -> Draft:
    """Grounding rows: `{image, phrase, box: [x1, y1, x2, y2] in 0..1, type?}`."""
    draft = Draft(text_of(item.get("image"), "image"), integer(item.get("image_id")))
    draft.phrases.append(phrase_of(item))
    return draft


def read_transvg(item: list[Any], box_format: str = "xywh") -> Draft:
    """TransVG's tuples `[file, _, box, phrase, attributes]`, boxes in pixels."""
    draft = Draft(text_of(item[0], "file"), pixel_boxes=True)
    x1, y1, x2, y2 = corners(item[2])
    if box_format == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if x1 >= x2 or y1 >= y2:
        raise BadItem(f"box {item[2]} read as {box_format} has no area")
    draft.phrases.append(Phrase(phrase=text_of(item[3], "phrase"), box=[x1, y1, x2, y2]))
    return draft


def read_own(item: Mapping[str, Any]) -> Draft:
    """This project's schema: `{image, captions?, questions?, phrases?, image_id?}`."""
    draft = Draft(text_of(item.get("image"), "image"))
    if "image_id" in item:
        draft.image_id = needed_integer(item["image_id"], "image_id")
    if "captions" in item:
        add_captions(draft, list_of(item["captions"], "captions"))
    for entry in list_of(item.get("questions", []), "questions"):
        question = mapping_of(entry, "question")
        answers = question.get("answers", {})
        draft.questions.append(
            asked(question.get("question"), answers, question.get("question_id"))
        )
    for entry in list_of(item.get("phrases", []), "phrases"):
        draft.phrases.append(phrase_of(mapping_of(entry, "phrase")))
    return draft


def has(*keys: str) -> Callable[[Any], bool]:
    """Recognises objects with these keys."""
    return lambda item: isinstance(item, dict) and all(key in item for key in keys)


def _is_own(item: Any) -> bool:
    own = ("captions", "questions", "phrases")
    return isinstance(item, dict) and "image" in item and any(key in item for key in own)


def _is_tuple(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 5


CAPTIONS, QUESTIONS, PHRASES, PAIR, ENTAILMENT = (
    frozenset({name}) for name in ("captions", "questions", "phrases", "pair", "entailment")
)
OWN = Format("JSON lines of this project", CAPTIONS | QUESTIONS | PHRASES, _is_own, read_own)
RETRIEVAL = Format("retrieval", CAPTIONS, has("image", "caption"), read_retrieval)
SENTENCES = Format("caption (sentences)", CAPTIONS, has("filename", "sentences"), read_sentences)
VQA_V2 = Format(
    "VQA v2",
    QUESTIONS,
    has("image_id", "question", "question_id"),
    vqa.read_vqa_v2,
    frozenset({"image_name", "annotations"}),
)
FORMATS = (
    SENTENCES,
    Format("VQA", QUESTIONS, has("image", "question"), vqa.read_vqa),
    VQA_V2,
    Format(
        "Visual Genome QA",
        QUESTIONS,
        has("id", "qas"),
        vqa.read_visual_genome,
        frozenset({"image_name"}),
        vqa.visual_genome_parts,
    ),
    Format("grounding", PHRASES, has("image", "phrase", "box"), read_grounding),
    Format("TransVG grounding", PHRASES, _is_tuple, read_transvg, frozenset({"box_format"})),
    RETRIEVAL,
    Format("NLVR2", PAIR, has("identifier", "sentence"), nlvr2.read_published),
    Format("NLVR2 (images)", PAIR, has("images", "sentence", "label"), nlvr2.read_plain),
    Format("SNLI-VE", ENTAILMENT, has("Flickr30K_ID", "gold_label"), snli_ve.read_published),
    Format("SNLI-VE (image)", ENTAILMENT, has("image", "sentence", "label"), snli_ve.read_plain),
    OWN,
)


def detect(
    items: Iterator[Item], path: Place, formats: Sequence[Format]
) -> tuple[Iterable[Item], Format]:
    """All items, and the format that one among the first is recognised as.

    Raises:
      SourceError: there are no items, or none of the first is of any of the formats.
    """
    first = list(itertools.islice(items, 100))
    if not first:
        raise SourceError(f"{path}: the list is empty")
    for item in first:
        for form in formats:
            if form.recognises(item.value):
                return itertools.chain(first, items), form
    found = first[0].error or (
        f"keys {', '.join(map(str, first[0].value))}"
        if isinstance(first[0].value, dict)
        else f"{first[0].value!r:.80}"
    )
    raise SourceError(
        f"{path}: the format is none of {', '.join(form.name for form in formats)}; "
        f"{first[0].where} has: {found}"
    )


def reader(form: Format, needed: str | None = None, **options: Any) -> Reader:
    """Reads values of one format, which must have the field `needed`.

    Args:
      form: the format.
      needed: "captions", "questions", ...; None takes any.
      **options: of `form.options`.
    """

    def read(value: Any) -> Draft | None:
        if not form.recognises(value):
            keys = f"keys {sorted(value)}" if isinstance(value, dict) else value
            raise BadItem(f"is not of the file's format ({form.name}): {keys!s:.120}")
        draft = form.read(value, **options)
        if needed is not None and draft is not None and not getattr(draft, needed):
            raise BadItem(f"has no {needed}")
        return draft

    return read


def coco_items(document: Mapping[str, Any], path: str) -> Iterator[Item]:
    """COCO `captions_*.json` (images and annotations apart) as retrieval items, one per picture.

    NoCaps' file is of this form, too; its pictures have a `domain`. An annotation that is no
    object or names no known picture is an item with an error.
    """
    captions: dict[Any, list[Any]] = {}
    pictures: dict[Any, Any] = {}
    for index, picture in enumerate(document["images"]):
        where = f"{path}: images[{index}]"
        if isinstance(picture, dict) and is_key(picture.get("id")):
            first, _ = pictures.setdefault(picture["id"], (where, picture))
            if first != where:
                yield Item(where, error=f"its id {picture['id']!r} is that of {first}")
        else:
            yield Item(where, error=f"is {brief(picture)}, not an object with an id")
    for index, annotation in enumerate(document["annotations"]):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if is_key(image_id) and image_id in pictures:
            captions.setdefault(image_id, []).append(annotation.get("caption"))
        else:
            yield Item(
                f"{path}: annotations[{index}]", error="its image_id is not among the images"
            )
    for image_id, (where, picture) in pictures.items():
        value = {
            "image": picture.get("file_name"),
            "image_id": image_id,
            "caption": captions.get(image_id, []),
            "domain": picture.get("domain"),
        }
        yield Item(where, value)
