"""Pictures that training and held-out sources share."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mplug_jax.data.inspection.survey import NamedSource, Survey, evenly, pictures_of
from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import decode_image

# Pairs of records that a message names.
EXAMPLES = 5


@dataclass(frozen=True)
class Overlap:
    """Pictures that are in both of two sources.

    Attributes:
      train, held_out: names of the sources.
      by: "path" or "pixels".
      count: how many there are.
      examples: (what they share, id in the one, id in the other) of the first.
    """

    train: str
    held_out: str
    by: str
    count: int
    examples: list[tuple[str, str, str]]


@dataclass
class Fingerprints:
    """The pictures of a source by their pixels.

    Attributes:
      name: of the source.
      total: its records.
      compared: how many records were looked at.
      found: the id of a record for each hash of a picture.
      failures: (record id, reason) of pictures that could not be decoded.
    """

    name: str
    total: int
    compared: int = 0
    found: dict[bytes, str] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)


def fingerprints(of: NamedSource, count: int) -> Fingerprints:
    """Hashes the decoded pictures of `count` records, evenly spaced.

    A copy that was saved anew without loss has the same pixels; one that was compressed again has
    not. Clips that are files are compared by path alone.
    """
    made = Fingerprints(of.name, len(of.source))
    for index in evenly(len(of.source), count):
        made.compared += 1
        try:
            record = of.source[index]
        except BadSample:  # the survey has told of it
            continue
        if isinstance(record.get("video"), str):
            continue
        for picture in pictures_of(record):
            try:
                made.found.setdefault(_hash(picture), record["id"])
            except BadSample as error:
                made.failures.append((record["id"], str(error)))
    return made


def _hash(picture: Any) -> bytes:
    clip = isinstance(picture, np.ndarray) and picture.ndim == 4
    pixels = picture if clip else decode_image(picture)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def path_overlaps(train: Sequence[Survey], held_out: Sequence[Survey]) -> list[Overlap]:
    """Pictures that both name by the same path."""
    return [
        overlap
        for one in train
        for other in held_out
        if (overlap := _overlap(one.of.name, one.paths, other.of.name, other.paths, "path"))
    ]


def pixel_overlaps(
    train: Sequence[Fingerprints], held_out: Sequence[Fingerprints]
) -> list[Overlap]:
    """Pictures of the same pixels, wherever they lie."""
    return [
        overlap
        for one in train
        for other in held_out
        if (overlap := _overlap(one.name, one.found, other.name, other.found, "pixels"))
    ]


def _overlap(
    train: str, mine: dict[Any, str], held_out: str, theirs: dict[Any, str], by: str
) -> Overlap | None:
    shared = [key for key in theirs if key in mine]
    if not shared:
        return None
    examples = [
        (os.fspath(key) if by == "path" else "the same pixels", mine[key], theirs[key])
        for key in shared[:EXAMPLES]
    ]
    return Overlap(train, held_out, by, len(shared), examples)
