"""Drafts of records, and the checks of the values that annotation files hold."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mplug_jax.data.records import Entailment, Pair, Phrase, Question
from mplug_jax.data.sources.json_reading import Item


class BadItem(ValueError):
    """An item that cannot become a record; the message is the reason."""


@dataclass
class Draft:
    """A record before its picture has a number.

    Attributes:
      image: path of the picture, or of the clip, relative to the source's folder.
      image_id: as the file gives it, if it gives one.
      name: what the data set calls the record; without one it is named after its picture.
      captions, questions, phrases, pair, entailment, domain: see `mplug_jax.data.records.Record`;
        the pair's second picture is relative, too.
      pixel_boxes: the phrases' boxes are in pixels still.
      is_video: `image` is a clip; frames: paths of its frames where the file lists them.
      complaints: what was left out of the record.
    """

    image: str
    image_id: int | None = None
    name: str | None = None
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    phrases: list[Phrase] = field(default_factory=list)
    pair: Pair | None = None
    entailment: Entailment | None = None
    domain: str | None = None
    pixel_boxes: bool = False
    is_video: bool = False
    frames: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


# What an item became: a draft, the reason why it cannot be used, or None where the data set itself
# marks it as not to be used.
Outcome = Draft | BadItem | None


class Reader(Protocol):
    """Turns the value of an item into a draft; None leaves it out; raises BadItem."""

    def __call__(self, value: Any) -> Draft | None: ...


def read_drafts(items: Iterable[Item], read: Reader) -> Iterator[tuple[str, Outcome]]:
    """(where, outcome) of each item."""
    for item in items:
        try:
            if item.error is not None:
                raise BadItem(item.error)
            yield item.where, read(item.value)
        except BadItem as error:
            yield item.where, error


def text_of(value: Any, what: str) -> str:
    """The stripped text; raises BadItem for other types and for empty text."""
    if not isinstance(value, str):
        raise BadItem(f"{what} is {brief(value)}, not a text")
    if not value.strip():
        raise BadItem(f"{what} is empty")
    return value.strip()


def brief(value: Any) -> str:
    """The value as a message shows it."""
    return "missing" if value is None else f"{value!r:.60}"


def list_of(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadItem(f"{what} is {brief(value)}, not a list")
    return value


def mapping_of(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadItem(f"{what} is {brief(value)}, not an object")
    return value


def integer(value: Any) -> int | None:
    """The value if it can serve as an image id, else None."""
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if usable else None


def needed_integer(value: Any, what: str) -> int:
    """The value, which must be able to serve as an image id; else raises BadItem."""
    number = integer(value)
    if number is None:
        raise BadItem(f"{what} is {brief(value)}, not an integer in 0 .. 2^31-1")
    return number


def is_key(value: Any) -> bool:
    """Whether the value can be the id of something: a number or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def choice(value: Any, choices: Iterable[Any], what: str) -> Any:
    """The value, which must be one of `choices`; else raises BadItem."""
    if value not in (listed := list(choices)):
        raise BadItem(f"{what} is {brief(value)}, not one of {', '.join(map(str, listed))}")
    return value


def add_captions(draft: Draft, captions: list[Any]) -> Draft:
    """Adds the usable captions, notes the others; raises BadItem if none is usable."""
    for number, caption in enumerate(captions):
        try:
            draft.captions.append(text_of(caption, f"caption {number}"))
        except BadItem as error:
            draft.complaints.append(str(error))
    if not draft.captions:
        raise BadItem("; ".join(draft.complaints) or "there is no caption")
    return draft


def weights(answers: Any) -> dict[str, float]:
    """`{answer: weight}` of a text, a list of the annotators' answers, or such a mapping.

    An answer's weight is the share of the list's entries that say so.
    """
    if isinstance(answers, dict):
        if not all(is_number(weight) and weight > 0 for weight in answers.values()):
            raise BadItem(f"answers has a weight that is no positive number: {brief(answers)}")
        return {text_of(answer, "answer"): float(weight) for answer, weight in answers.items()}
    listed = answers if isinstance(answers, list) else [answers]
    if not listed:
        raise BadItem("answer is an empty list")
    counts: dict[str, float] = {}
    for answer in listed:
        answer = text_of(answer, "answer")
        counts[answer] = counts.get(answer, 0) + 1
    return {answer: count / len(listed) for answer, count in counts.items()}


def asked(question: Any, answers: Any, question_id: Any = None) -> Question:
    """A question; one without an answer is `answers={}`."""
    made = Question(question=text_of(question, "question"), answers=weights(answers))
    if is_key(question_id):
        made["question_id"] = question_id
    return made


def is_number(value: Any) -> bool:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    # JSON's whole numbers may be larger than any float, which isfinite refuses.
    return usable and abs(value) <= sys.float_info.max


def corners(box: Any) -> list[float]:
    """A box's four numbers; raises BadItem."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise BadItem(f"box is {brief(box)}, not four numbers")
    return [float(value) for value in box]


def phrase_of(item: Mapping[str, Any]) -> Phrase:
    """`{phrase, box: [x1, y1, x2, y2] in 0..1, type?}`; raises BadItem."""
    x1, y1, x2, y2 = box = corners(item.get("box"))
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
