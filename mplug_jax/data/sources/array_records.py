"""ArrayRecord shards of this project's records: one file for many pictures, read at random.

The encoding: each record is a MessagePack map with the keys of `mplug_jax.data.records.Record` and
whatever else its source had. `id`, `image`, `image_id` and `captions` are always there. `image`
(and `image2` of a `pair`) is the content of an image file, JPEG as a rule, in binary; all else is
what JSON could hold as well. Shards are written with `group_size:1`, so that one record is read at
a time.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from mplug_jax.data.files import RemotePath, local_copy, place
from mplug_jax.data.records import BadSample, Record, SourceError
from mplug_jax.data.sources.drafts import (
    BadItem,
    asked,
    brief,
    choice,
    integer,
    list_of,
    mapping_of,
    phrase_of,
    text_of,
)
from mplug_jax.data.sources.shards import find_shards

# In a folder, files of these names are shards.
MARKS = (".array_record", ".arrayrecord")
# Keys of other sources' records, whose values are no pictures in shards.
NEVER_HELD = ("video", "clip", "features")


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as a shard holds it; pictures are read from their paths, and arrays become PNG.

    Raises:
      BadSample: a picture cannot be read, the record is a clip, or holds what JSON could not.
    """
    if "video" in record:
        raise BadSample(f"{record['id']}: is a clip; shards hold pictures only")
    encoded = {**record, "image": _picture_bytes(record["image"])}
    if "pair" in record:
        pair = record["pair"]
        encoded["pair"] = {**pair, "image2": _picture_bytes(pair["image2"])}
    try:
        return msgpack.packb(encoded, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"{record['id']}: cannot be encoded: {error}") from error


def decode_record(content: bytes) -> Record:
    """The record that `encode_record` encoded, with pictures as bytes.

    Raises:
      BadSample: the content is none.
    """
    try:
        record = msgpack.unpackb(content, strict_map_key=False)
    except ValueError as error:
        raise BadSample(f"is no MessagePack: {error}") from error
    if not isinstance(record, dict):
        raise BadSample(f"is a {type(record).__name__}, not a map")
    wrong = [
        key
        for key, usable in (
            ("id", isinstance(record.get("id"), str)),
            ("image", isinstance(record.get("image"), bytes)),
            ("image_id", integer(record.get("image_id")) is not None),
            ("captions", isinstance(record.get("captions"), list)),
            *((key, key not in record) for key in NEVER_HELD),
        )
        if not usable
    ]
    if wrong:
        raise BadSample(f"has no usable {', '.join(wrong)}")
    try:
        _check_texts(record)
    except BadItem as error:
        raise BadSample(f"{record['id']}: {error}") from error
    return record


def _check_texts(record: Mapping[str, Any]) -> None:
    """Raises BadItem where what examples are made of has another type than it should."""
    for caption in record["captions"]:
        text_of(caption, "a caption")
    for question in list_of(record.get("questions", []), "questions"):
        question = mapping_of(question, "a question")
        asked(question.get("question"), mapping_of(question.get("answers", {}), "answers"))
        others = [question.get("objects", ""), *list_of(question.get("ocr", []), "ocr")]
        others += list_of(question.get("annotators", []), "annotators")
        if not all(isinstance(text, str) for text in others):
            raise BadItem(f"ocr, objects or annotators hold {brief(others)}, not texts")
    for phrase in list_of(record.get("phrases", []), "phrases"):
        phrase_of(mapping_of(phrase, "a phrase"))
    if "pair" in record:
        pair = mapping_of(record["pair"], "pair")
        text_of(pair.get("sentence"), "the pair's sentence")
        choice(pair.get("label"), (True, False), "the pair's label")
        if not isinstance(pair.get("image2"), bytes):
            raise BadItem("the pair has no second picture")
    if "entailment" in record:
        entailment = mapping_of(record["entailment"], "entailment")
        for key in ("hypothesis", "label"):
            text_of(entailment.get(key), key)


class ArrayRecords:
    """Records of ArrayRecord shards; the shards are opened when they are first read.

    Args:
      paths: of the shards, on a local disk.

    Raises:
      SourceError: a shard cannot be read, or the first record is none of this project's.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = list(paths)
        self._data = _opened(self._paths)
        if not len(self._data):
            raise SourceError(f"{self._paths[0]}: no records in {len(self._paths)} shards")
        try:
            self[0]
        except BadSample as error:
            raise SourceError(
                f"{error}. Shards of this source hold records in MessagePack "
                "(mplug_jax.data.sources.array_records.encode_record); those of a TFDS data set "
                "are read by kind 'tfds'"
            ) from error

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"ArrayRecords({len(self)} records in {len(self._paths)} shards)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where a record is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return decode_record(self._data[index])
        except (BadSample, RuntimeError) as error:
            raise BadSample(f"{self._paths[0]}: record {index} of the source: {error}") from error


def array_records(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> ArrayRecords:
    """The records of ArrayRecord shards in the encoding above.

    Args:
      path: a folder of files called `*.array_record` or `*.array_record-00000-of-00004`, a
        pattern, or one file; joined with `root` where relative. Shards at a URL are copied to the
        user's cache first, since ArrayRecord reads local files only.
      root: config.data.root.

    Raises:
      SourceError: there are no shards, or as `ArrayRecords` and `local_copy`.
    """
    shards = find_shards(path, root, MARKS)
    local = [local_copy(shard) if isinstance(shard, RemotePath) else shard for shard in shards]
    return ArrayRecords([str(shard) for shard in local])


def _opened(paths: list[str]) -> Sequence[bytes]:
    try:
        return ArrayRecordDataSource(paths)
    except RuntimeError as error:
        if len(paths) > 1:  # the error does not say which it was
            for path in paths:
                _opened([path])
        reason = str(error) or "is it cut off?"
        raise SourceError(f"{paths[0]}: cannot be read as an ArrayRecord file: {reason}") from error


def _picture_bytes(image: np.ndarray | str | os.PathLike[str] | bytes) -> bytes:
    """The content of an image file, whatever a record's `image` is."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()
    try:
        return place(image).read_bytes()
    except OSError as error:
        raise BadSample(f"{os.fspath(image)}: cannot be read: {error.strerror}") from error


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no value of JSON")
