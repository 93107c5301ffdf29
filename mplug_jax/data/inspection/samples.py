"""A few records made into examples: how long it takes, what fails, and what the model then gets."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mplug_jax.data.augmented import made_for
from mplug_jax.data.examples import Example
from mplug_jax.data.inspection.survey import NamedSource, Room, evenly, text_length, texts_of
from mplug_jax.data.records import BadSample
from mplug_jax.data.tokenizers import Tokenizer

# Lists of a record of which an example takes one item.
DRAWN = ("captions", "questions", "phrases")
# Frames of a clip that are shown.
SHOWN_FRAMES = 4


@dataclass(frozen=True)
class Sample:
    """An example, read back.

    Attributes:
      record_id: of the record that it was made of.
      pictures: uint8 [H, W, 3] each, as the model gets them.
      box: x1, y1, x2, y2 as fractions of the picture, where the example has one.
      given: (kind, text) of the record, before anything was done to it.
      made: (name, text) as the model gets it, read back by the tokenizer; [SEP] is its end.
      warnings: what was cut.
    """

    record_id: str
    pictures: list[np.ndarray]
    box: tuple[float, float, float, float] | None
    given: list[tuple[str, str]]
    made: list[tuple[str, str]]
    warnings: list[str]


@dataclass
class Sampled:
    """What came of the records tried.

    Attributes:
      of: the source.
      tried: records.
      failures: (record id, reason).
      pictures: pictures and frames that were decoded.
      seconds: of one thread, for reading the records and making the examples.
      shown: the first of them.
    """

    of: NamedSource
    tried: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    pictures: int = 0
    seconds: float = 0.0
    shown: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds if self.seconds else 0.0


def sample(
    of: NamedSource,
    make_example: Callable[..., Example],
    count: int,
    seed: int,
    show: Callable[[Mapping[str, Any], Example], Sample] | None = None,
    shown: int = 0,
) -> Sampled:
    """Makes examples of `count` records, evenly spaced, with one caption, question or phrase each.

    Args:
      of: the source.
      make_example: `(record, rng) -> example`, as the pipeline gets it.
      count: records.
      seed: of what is drawn and of the augmentation.
      show: (record, example) -> what is shown of it; None shows nothing.
      shown: how many are shown.

    Raises:
      SourceError: something is missing that every record needs, such as a reader of video files.
    """
    result = Sampled(of)
    make_example = made_for(of.source, make_example)
    for index in evenly(len(of.source), count):
        rng = np.random.default_rng([seed, index])
        start = time.perf_counter()
        name = f"record {index}"
        result.tried += 1
        try:
            record = of.source[index]
            name = record["id"]
            record = _with_one_item(record, rng)
            example = make_example(record, rng)
        except BadSample as error:
            result.failures.append((name, str(error)))
            continue
        finally:
            result.seconds += time.perf_counter() - start
        result.pictures += len(pictures_in(example))
        if show is not None and len(result.shown) < shown:
            result.shown.append(show(record, example))
    return result


def _with_one_item(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The record with one caption, question and phrase, so that what was drawn is known."""
    drawn = {
        key: [record[key][int(rng.integers(len(record[key])))]] for key in DRAWN if record.get(key)
    }
    return {**record, **drawn}


def pictures_in(example: Example) -> list[np.ndarray]:
    """The picture [H, W, 3] of an example, or its several ones."""
    image = example["image"]
    return [image] if image.ndim == 3 else list(image)


@dataclass(frozen=True)
class ReadBack:
    """(record, example) to a `Sample`.

    Attributes:
      tokenizer: of the texts.
      rooms: of the kinds of text that the model reads.
      labels: names of the classes, where examples have a label.
    """

    tokenizer: Tokenizer
    rooms: Mapping[str, Room]
    labels: Sequence[str] = ()

    def __call__(self, record: Mapping[str, Any], example: Example) -> Sample:
        """Decodes every array of tokens, and names what was cut."""
        pictures = pictures_in(example)
        if len(pictures) > SHOWN_FRAMES:
            pictures = [pictures[index] for index in evenly(len(pictures), SHOWN_FRAMES)]
        texts = texts_of(record)
        given = [(kind, text) for kind, listed in texts.items() for text in listed]
        if record.get("phrases"):
            box = ", ".join(f"{side:.2f}" for side in record["phrases"][0]["box"])
            given.append(("box", box))
        return Sample(
            record["id"], pictures, _corners(example), given, self._made(example), self._cut(texts)
        )

    def _made(self, example: Example) -> list[tuple[str, str]]:
        made = []
        for key in example:
            if not key.endswith("_ids"):
                continue
            name = key.removesuffix("_ids")
            ids, mask = np.atleast_2d(example[key]), np.atleast_2d(example[f"{name}_mask"])
            weights = example.get(f"{name}_weights")
            for row in range(len(ids)):
                if weights is not None and not weights[row]:
                    continue
                text = read_tokens(ids[row][mask[row]], self.tokenizer)
                weight = "" if weights is None else f" (weight {weights[row]:.2f})"
                made.append((name, text + weight))
        if "label" in example:
            made.append(("label", self.labels[int(example["label"])]))
        return made

    def _cut(self, texts: Mapping[str, list[str]]) -> list[str]:
        return [
            f"cut: {length} tokens, {room.setting} is {room.tokens}"
            for kind, room in self.rooms.items()
            for text in texts.get(kind, ())
            if (length := text_length(text, self.tokenizer, room.prompt)) > room.tokens
        ]


def read_tokens(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of unpadded tokens, with every [SEP] and without [CLS]."""
    parts, part = [], []
    for token in map(int, ids):
        if token == tokenizer.sep_id:
            parts += [tokenizer.decode(part), "[SEP]"]
            part = []
        else:
            part.append(token)
    parts.append(tokenizer.decode(part))
    return " ".join(filter(None, parts))


def _corners(example: Example) -> tuple[float, float, float, float] | None:
    if "box" not in example:
        return None
    x, y, width, height = map(float, example["box"])
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
