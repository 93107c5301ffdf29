"""The published annotation formats: one reader each, found by what an item looks like.

A reader turns one item into a `Draft` or raises `BadItem` with the reason. `docs/data.md` shows
every format.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mplug_jax.data.records import Phrase, Question
from mplug_jax.data.sources.json_reading import Item


class BadItem(ValueError):
    """An item that cannot become a record; the message is the reason."""


@dataclass
class Draft:
    """A record before its picture has a number.

    Attributes:
      image: path of the picture relative to the folder of images.
      image_id: as the file gives it, if it gives one.
      captions, questions, phrases: see `mplug_jax.data.records.Record`.
      pixel_boxes: the phrases' boxes are in pixels still.
      complaints: what was left out of the record.
    """

    image: str
    image_id: int | None = None
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    phrases: list[Phrase] = field(default_factory=list)
    pixel_boxes: bool = False
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
      name: for messages.
      holds: which of captions, questions, phrases its records can have.
      recognises: whether an item is of this format.
      read: item to draft.
    """

    name: str
    holds: frozenset[str]
    recognises: Callable[[Any], bool]
    read: Callable[[Any], Draft]


def text_of(value: Any, what: str) -> str:
    """The stripped text; raises BadItem for other types and for empty text."""
    if not isinstance(value, str):
        raise BadItem(f"{what} is {_brief(value)}, not a text")
    if not value.strip():
        raise BadItem(f"{what} is empty")
    return value.strip()


def _brief(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"


def _list_of(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadItem(f"{what} is {_brief(value)}, not a list")
    return value


def _integer(value: Any) -> int | None:
    """The value if it can serve as an image id, else None."""
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if usable else None


def _add_captions(draft: Draft, captions: list[Any]) -> Draft:
    """Adds the usable captions, notes the others; raises BadItem if none is usable."""
    for number, caption in enumerate(captions):
        try:
            draft.captions.append(text_of(caption, f"caption {number}"))
        except BadItem as error:
            draft.complaints.append(str(error))
    if not draft.captions:
        raise BadItem("; ".join(draft.complaints) or "there is no caption")
    return draft


def read_retrieval(item: Mapping[str, Any]) -> Draft:
    """Official retrieval: `{image, caption, image_id}`, caption a text or a list of texts."""
    captions = item["caption"]
    draft = Draft(text_of(item.get("image"), "image"), _integer(item.get("image_id")))
    return _add_captions(draft, captions if isinstance(captions, list) else [captions])


def read_sentences(item: Mapping[str, Any]) -> Draft:
    """Official caption and Karpathy: `{filename, filepath?, sentences: [{raw}], cocoid?}`."""
    name = text_of(item.get("filename"), "filename")
    folder = item.get("filepath") or ""
    if not isinstance(folder, str):
        raise BadItem(f"filepath is {_brief(folder)}, not a text")
    sentences = _list_of(item["sentences"], "sentences")
    raw = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    image_id = _integer(item.get("cocoid", item.get("imgid")))
    return _add_captions(Draft(os.path.join(folder, name), image_id), raw)


def read_vqa(item: Mapping[str, Any]) -> Draft:
    """Official VQA: `{image, question, question_id, answer, ocr, object_label, dataset}`.

    `answer` is the list of the annotators' answers, or a text; an answer's weight is the share of
    annotators who gave it. Rows of a test set have none.
    """
    draft = Draft(text_of(item.get("image"), "image"), _integer(item.get("image_id")))
    question = Question(
        question=text_of(item["question"], "question"), answers=_weights(item.get("answer", {}))
    )
    if isinstance(item.get("question_id"), int | str):
        question["question_id"] = item["question_id"]
    if isinstance(item.get("ocr"), list):  # [[position, token], ...]
        question["ocr"] = [str(pair[-1]) for pair in item["ocr"] if isinstance(pair, list) and pair]
    if isinstance(item.get("object_label"), str):
        question["objects"] = item["object_label"]
    draft.questions.append(question)
    return draft


def _weights(answers: Any) -> dict[str, float]:
    """`{answer: weight}` of a text, a list of the annotators' answers, or such a mapping."""
    if isinstance(answers, dict):
        if not all(_number(weight) and weight > 0 for weight in answers.values()):
            raise BadItem(f"answers has a weight that is no positive number: {_brief(answers)}")
        return {text_of(answer, "answer"): float(weight) for answer, weight in answers.items()}
    listed = answers if isinstance(answers, list) else [answers]
    if not listed:
        raise BadItem("answer is an empty list")
    weights: dict[str, float] = {}
    for answer in listed:
        answer = text_of(answer, "answer")
        weights[answer] = weights.get(answer, 0) + 1
    return {answer: count / len(listed) for answer, count in weights.items()}


def read_grounding(item: Mapping[str, Any]) -> Draft:
    """Grounding rows: `{image, phrase, box: [x1, y1, x2, y2] in 0..1, type?}`."""
    draft = Draft(text_of(item.get("image"), "image"), _integer(item.get("image_id")))
    draft.phrases.append(_phrase(item))
    return draft


def _number(value: Any) -> bool:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return usable and math.isfinite(value)


def _corners(box: Any) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_number, box)):
        raise BadItem(f"box is {_brief(box)}, not four numbers")
    return [float(value) for value in box]


def _phrase(item: Mapping[str, Any]) -> Phrase:
    x1, y1, x2, y2 = box = _corners(item.get("box"))
    # Annotations rounded to three places may stand out by as much.
    if min(box) < -1e-3 or max(box) > 1 + 1e-3 or x1 >= x2 or y1 >= y2:
        raise BadItem(f"box {box} is not x1 < x2, y1 < y2 in fractions of the picture (0 to 1)")
    phrase = Phrase(
        phrase=text_of(item.get("phrase"), "phrase"),
        box=[min(max(value, 0.0), 1.0) for value in box],
    )
    if isinstance(item.get("type"), str):
        phrase["type"] = item["type"]
    return phrase


def read_transvg(item: list[Any], box_format: str = "xywh") -> Draft:
    """TransVG's tuples `[file, _, box, phrase, attributes]`, boxes in pixels."""
    draft = Draft(text_of(item[0], "file"), pixel_boxes=True)
    x1, y1, x2, y2 = _corners(item[2])
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
        draft.image_id = _integer(item["image_id"])
        if draft.image_id is None:
            raise BadItem(f"image_id is {_brief(item['image_id'])}, not an integer in 0 .. 2^31-1")
    if "captions" in item:
        _add_captions(draft, _list_of(item["captions"], "captions"))
    for entry in _list_of(item.get("questions", []), "questions"):
        question = _mapping(entry, "question")
        draft.questions.append(
            Question(
                question=text_of(question.get("question"), "question"),
                answers=_weights(question.get("answers", {})),
            )
        )
        if isinstance(question.get("question_id"), int | str):
            draft.questions[-1]["question_id"] = question["question_id"]
    for entry in _list_of(item.get("phrases", []), "phrases"):
        draft.phrases.append(_phrase(_mapping(entry, "phrase")))
    return draft


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadItem(f"{what} is {_brief(value)}, not an object")
    return value


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda item: isinstance(item, dict) and all(key in item for key in keys)


def _is_own(item: Any) -> bool:
    own = ("captions", "questions", "phrases")
    return isinstance(item, dict) and "image" in item and any(key in item for key in own)


def _is_tuple(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 5


CAPTIONS, QUESTIONS, PHRASES = (frozenset({n}) for n in ("captions", "questions", "phrases"))
OWN = Format("JSON lines of this project", CAPTIONS | QUESTIONS | PHRASES, _is_own, read_own)
RETRIEVAL = Format("retrieval", CAPTIONS, _has("image", "caption"), read_retrieval)
SENTENCES = Format("caption (sentences)", CAPTIONS, _has("filename", "sentences"), read_sentences)
FORMATS = (
    SENTENCES,
    Format("VQA", QUESTIONS, _has("image", "question"), read_vqa),
    Format("grounding", PHRASES, _has("image", "phrase", "box"), read_grounding),
    Format("TransVG grounding", PHRASES, _is_tuple, read_transvg),
    RETRIEVAL,
    OWN,
)


def coco_items(document: Mapping[str, Any], path: str) -> Iterator[Item]:
    """COCO `captions_*.json` (images and annotations apart) as retrieval items, one per picture.

    An annotation that is no object or names no known picture is an item with an error.
    """
    captions: dict[Any, list[Any]] = {}
    pictures: dict[Any, Any] = {}
    for index, picture in enumerate(document["images"]):
        where = f"{path}: images[{index}]"
        if isinstance(picture, dict) and "id" in picture:
            pictures[picture["id"]] = (where, picture.get("file_name"))
        else:
            yield Item(where, error=f"is {_brief(picture)}, not an object with an id")
    for index, annotation in enumerate(document["annotations"]):
        known = isinstance(annotation, dict) and annotation.get("image_id") in pictures
        if known:
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            yield Item(
                f"{path}: annotations[{index}]", error="its image_id is not among the images"
            )
    for image_id, (where, name) in pictures.items():
        value = {"image": name, "image_id": image_id, "caption": captions.get(image_id, [])}
        yield Item(where, value)
