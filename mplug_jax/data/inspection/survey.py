"""Reads the records of a source without their pictures: counts, and lengths of texts."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mplug_jax.data.records import BadSample, Source
from mplug_jax.data.tokenizers import Tokenizer

# Records read of a source that draws or holds its pictures, where nothing else is asked for.
READ_WITH_PICTURES = 2_000
# Texts of a kind that are kept for being too long.
LONGEST = 5


@dataclass(frozen=True)
class NamedSource:
    """A source and what the config says of it.

    Attributes:
      name: its place in the config, such as "data.train[0]".
      source: the records.
      spec: the entry of the config.
      held_out: whether an evaluator reads it.
      max_bad_fraction: bad records that a run tolerates.
    """

    name: str
    source: Source
    spec: Mapping[str, Any]
    held_out: bool
    max_bad_fraction: float


@dataclass(frozen=True)
class Room:
    """How many tokens the model takes of a kind of text.

    Attributes:
      tokens: with [CLS] and [SEP].
      setting: the setting that says so.
      prompt: tokens of a prompt that come before every text.
    """

    tokens: int
    setting: str
    prompt: int = 0


@dataclass
class Survey:
    """What `survey` found in a source.

    Attributes:
      of: the source.
      read: how many of its records were read.
      counts: items by kind, such as captions, of the records read.
      paths: the id of a record for each path of a picture or a clip.
      lengths: how many texts of a kind have how many tokens, with [CLS], prompt and [SEP].
      longest: (tokens, record id, text) of the longest texts that are cut, by kind.
      unusable: (where, reason) of everything left out: when the source was built, and since.
      left_out: records that the data set itself marks as not to be used.
    """

    of: NamedSource
    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    paths: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    longest: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    left_out: int = 0


def survey(
    of: NamedSource, tokenizer: Tokenizer, rooms: Mapping[str, Room], records: int = 0
) -> Survey:
    """Counts what a source holds.

    Args:
      of: the source.
      tokenizer: texts are measured in its tokens.
      rooms: of each kind of text that the model reads; others are counted, not measured.
      records: read at most so many, evenly spaced; 0 reads all where records only name their
        pictures, and `READ_WITH_PICTURES` where reading one draws or loads it.
    """
    found = Survey(of, unusable=list(getattr(of.source, "bad_records", ())))
    found.left_out = getattr(of.source, "left_out", 0)
    for index in evenly(len(of.source), records or _enough(of.source)):
        found.read += 1
        try:
            record = of.source[index]
        except BadSample as error:
            found.unusable.append((f"record {index}", str(error)))
            continue
        for picture in pictures_of(record):
            if isinstance(picture, str):
                found.paths.setdefault(picture, record["id"])
        for kind, texts in texts_of(record).items():
            found.counts[kind] += len(texts)
            if kind in rooms:
                _measure(found, kind, texts, record["id"], tokenizer, rooms[kind])
    return found


def _enough(source: Source) -> int:
    for index in range(len(source)):
        try:
            named = all(isinstance(picture, str) for picture in pictures_of(source[index]))
        except BadSample:
            continue
        return len(source) if named else READ_WITH_PICTURES
    return len(source)


def _measure(
    found: Survey,
    kind: str,
    texts: Iterable[str],
    record_id: str,
    tokenizer: Tokenizer,
    room: Room,
) -> None:
    lengths = found.lengths.setdefault(kind, Counter())
    longest = found.longest.setdefault(kind, [])
    for text in texts:
        length = text_length(text, tokenizer, room.prompt)
        lengths[length] += 1
        if length > room.tokens:
            keep = heapq.heappush if len(longest) < LONGEST else heapq.heappushpop
            keep(longest, (length, record_id, text))


def text_length(text: str, tokenizer: Tokenizer, prompt: int = 0) -> int:
    """Tokens of [CLS], a prompt of `prompt` tokens, the text and [SEP]."""
    return 2 + prompt + sum(map(len, tokenizer.words(text)))


def evenly(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spaced; all of them where there are fewer."""
    if count >= total:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, count)]


def pictures_of(record: Mapping[str, Any]) -> list[Any]:
    """What a record shows: its clip or the frames it lists, or its picture and a pair's second."""
    if "video" in record:
        video = record["video"]
        return video if isinstance(video, list) else [video]
    second = [record["pair"]["image2"]] if "pair" in record else []
    return [record["image"], *second]


def texts_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """A record's texts by kind; a record has few of the kinds."""
    questions = record.get("questions") or ()
    texts = {
        "captions": list(record.get("captions") or ()),
        "questions": [question["question"] for question in questions],
        "answers": [answer for question in questions for answer in question.get("answers", ())],
        "phrases": [phrase["phrase"] for phrase in record.get("phrases") or ()],
        "sentences": [record["pair"]["sentence"]] if "pair" in record else [],
        "hypotheses": [record["entailment"]["hypothesis"]] if "entailment" in record else [],
    }
    return {kind: listed for kind, listed in texts.items() if listed}
