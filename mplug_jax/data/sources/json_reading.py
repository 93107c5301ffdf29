"""Reads annotation files into items that know where they stand: arrays, JSON lines, one object."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mplug_jax.data.files import Place
from mplug_jax.data.records import SourceError

_BETWEEN_ITEMS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Item:
    """One element of an annotation file.

    Attributes:
      where: `file:line`, or `file: images[3]` inside a JSON object.
      value: the parsed value; None where `error` is set.
      error: why the line is no JSON.
    """

    where: str
    value: Any = None
    error: str | None = None


def read_items(path: Place) -> Iterator[Item] | dict[str, Any]:
    """The items of a JSON array or of a file of JSON lines, or the one document a file holds.

    What the file is shows in its content; its name does not matter. A document is an object of
    lists named images, annotations or questions; any other object is an item. A broken line of
    JSON lines is an item with an error.

    Raises:
      SourceError: the file is missing, empty, not UTF-8, or neither JSON nor JSON lines (with line
        and column); of an array while iterating.
    """
    text = _text(path)
    start = len(text) - len(text.lstrip())
    if text[start] == "[":
        return _array_items(path, text, start + 1)
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        if _looks_like_lines(text):
            return _line_items(path, text)
        raise _no_json(path, text, error) from error
    return value if _is_document(value) else iter([Item(f"{path}:1", value)])


def read_document(path: Place) -> dict[str, Any]:
    """The one JSON object a file holds.

    Raises:
      SourceError: as `read_items`, or the file holds something else.
    """
    text = _text(path)
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        raise _no_json(path, text, error) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def _text(path: Place) -> str:
    """The text of a file; raises SourceError where it cannot be read or is blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{path}: is not a UTF-8 text file: line {line}: {error}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise SourceError(f"{path}: the file is empty")
    return text


def _is_document(value: Any) -> bool:
    """Whether an object holds all items, and is not the one row of a file of JSON lines."""
    if not isinstance(value, dict) or {"image", "video", "sentence"} & value.keys():
        return False
    return any(isinstance(value.get(key), list) for key in ("images", "annotations", "questions"))


def _looks_like_lines(text: str) -> bool:
    """Whether one of the first lines is a JSON object of its own."""
    for line in text.split("\n", 20)[:20]:
        try:
            if isinstance(_parsed(line), dict):
                return True
        except json.JSONDecodeError:
            continue
    return False


def _line_items(path: Place, text: str) -> Iterator[Item]:
    # Not splitlines(): JSON strings may hold its rarer separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Item(where, _parsed(line))
        except json.JSONDecodeError as error:
            yield Item(where, error=f"no JSON: {error.msg} at column {error.colno}")


def _array_items(path: Place, text: str, position: int) -> Iterator[Item]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        position = _BETWEEN_ITEMS.match(text, position).end()
        if text.startswith("]", position):
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            with _as_decode_errors(text, position):
                value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _no_json(path, text, error) from error
        yield Item(f"{path}:{line}", value)


def _parsed(text: str) -> Any:
    with _as_decode_errors(text, 0):
        return json.loads(text)


@contextlib.contextmanager
def _as_decode_errors(text: str, position: int) -> Iterator[None]:
    """The parser's other errors, of nesting and of numbers without end, as JSONDecodeErrors."""
    try:
        yield
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, position) from error
    except ValueError as error:
        raise json.JSONDecodeError("a number has too many digits", text, position) from error


def _no_json(path: Place, text: str, error: json.JSONDecodeError) -> SourceError:
    reason = error.msg
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        reason += " (the file ends there: was it cut off?)"
    return SourceError(
        f"{path}: is neither JSON nor JSON lines: line {error.lineno} column {error.colno}: "
        f"{reason}"
    )
