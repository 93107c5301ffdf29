"""What a data source yields, and the two errors of the data package."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, TypedDict

import numpy as np


class Question(TypedDict, total=False):
    """One question about a picture; `answers` maps an answer to its weight in (0, 1].

    Where the data set has them: `annotators` are the annotators' answers as they gave them, in
    order (the VQA challenge's accuracy compares with each of the ten); `answer_type` is "yes/no",
    "number" or "other"; `soft_labels` maps an answer to its score.
    """

    question: str
    question_id: int | str
    answers: dict[str, float]
    annotators: list[str]
    answer_type: str
    soft_labels: dict[str, float]
    ocr: list[str]
    objects: str


class Phrase(TypedDict, total=False):
    """A phrase and the one box it refers to: x1, y1, x2, y2 as fractions of width and height."""

    phrase: str
    box: list[float]
    type: str


class Pair(TypedDict):
    """A sentence about the record's picture (the left one) and a second one, and its truth."""

    image2: np.ndarray | str | bytes
    sentence: str
    label: bool


class Entailment(TypedDict):
    """A hypothesis about the picture and how the picture bears on it."""

    hypothesis: str
    label: Literal["entailment", "neutral", "contradiction"]


class Record(TypedDict, total=False):
    """One item of a source.

    `id` (unique, printable), `image` (uint8 [H, W, 3], the path or URL of an image file, or its
    bytes), `image_id` (int32 range, equal for records of the same picture) and `captions` are
    always there; the rest where the source has it. A source may add keys of its own.

    `video` is a clip: the path of a video file or of a folder of frames, the paths of its frames,
    or uint8 [T, H, W, 3] (`mplug_jax.data.clips` reads all of these); with a path, `image` is the
    same path, with several the first. `domain` is
    the part of the data set that the picture belongs to, such as NoCaps' "near-domain".
    """

    id: str
    image: np.ndarray | str | bytes
    image_id: int
    captions: list[str]
    questions: list[Question]
    phrases: list[Phrase]
    pair: Pair
    entailment: Entailment
    video: np.ndarray | str | list[str]
    domain: str


class Source(Protocol):
    """Random access to records: `len(source)` and `source[i]` for 0 <= i < len(source)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | dict[str, Any]: ...


class BadSample(ValueError):
    """One record cannot be used (undecodable image, no usable caption); names path and reason."""


class SourceError(ValueError):
    """A data source as a whole cannot be used; says what, where and what to do about it."""


@contextlib.contextmanager
def naming(record: Mapping[str, Any]) -> Iterator[None]:
    """Puts the record's id into what is said of its pictures, unless that names their paths."""
    try:
        yield
    except BadSample as error:
        if isinstance(record["image"], str):
            raise
        raise BadSample(f"{record['id']}: {error}") from error
