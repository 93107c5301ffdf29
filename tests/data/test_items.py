"""One record an item, of a source whose records hold several or none."""

import logging
from typing import Any

import pytest

from mplug_jax.data.items import Items
from mplug_jax.data.records import BadSample, SourceError


class Listed:
    """Records of these questions; None stands for one that cannot be used."""

    def __init__(self, *questions: list[str] | None):
        self._questions = questions
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._questions)

    def __repr__(self) -> str:
        return "Listed"

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        if self._questions[index] is None:
            raise BadSample(f"{index}.jpg: no such file")
        return {"id": str(index), "image_id": 10 + index, "questions": self._questions[index]}


def told(items: Items) -> list[tuple[int, str]]:
    return [
        (items[i]["image_id"], question)
        for i in range(len(items))
        for question in items[i]["questions"]
    ]


def test_every_item_is_a_record_of_its_picture():
    items = Items(Listed(["a", "b"], [], ["c"]), "questions")
    assert told(items) == [(10, "a"), (10, "b"), (12, "c")]
    assert items.places == [(0, 0), (0, 1), (2, 0)]
    assert items[1]["id"] == "0"


def test_a_record_of_the_source_is_left_as_it_is():
    record = {"id": "x", "questions": ["a", "b"]}
    items = Items([record], "questions")
    assert items[1] == {"id": "x", "questions": ["b"]}
    assert record["questions"] == ["a", "b"]


def test_the_limit_counts_items_and_reads_no_record_beyond():
    source = Listed(["a", "b"], ["c", "d", "e"], ["f"])
    assert told(Items(source, "questions", limit=3)) == [(10, "a"), (10, "b"), (11, "c")]
    assert 2 not in source.read
    assert len(Items(source, "questions", limit=100)) == 6


def test_records_that_cannot_be_used_hold_no_item(caplog):
    with caplog.at_level(logging.WARNING):
        items = Items(Listed(None, ["a"]), "questions")
    assert told(items) == [(11, "a")]
    assert "0.jpg: no such file" in caplog.text


@pytest.mark.parametrize("source", [Listed([], []), Listed(None), Listed()])
def test_a_source_without_items_is_refused(source):
    with pytest.raises(SourceError, match="Listed holds no questions: choose a source that does"):
        Items(source, "questions")
    with pytest.raises(SourceError, match="holds no phrases"):
        Items(Listed(["a"]), "phrases")
