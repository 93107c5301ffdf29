"""The order of ids, and what the messages name."""

import pytest

from mplug_jax.evaluation.ids import common_ids


def test_order_depends_on_the_ids_alone():
    truths = dict.fromkeys([3, "b", 1, "a", 10, 2])
    expected = [1, 2, 3, 10, "a", "b"]
    assert common_ids(truths, truths, "answer") == expected
    backwards = dict(reversed(truths.items()))
    assert common_ids(truths, backwards, "answer") == expected


def test_messages_name_a_few_ids_of_many():
    truths = dict.fromkeys(range(20))
    with pytest.raises(ValueError, match=r"17 answers \(3, 4, 5, 6, 7, \.\.\.\) missing"):
        common_ids(dict.fromkeys(range(3)), truths, "answer")
    with pytest.raises(ValueError, match=r"2 answers \('x', 'y'\) of unknown id"):
        common_ids(truths | {"x": 0, "y": 0}, truths, "answer")
    with pytest.raises(ValueError, match="no answer to score"):
        common_ids({}, {}, "answer")
