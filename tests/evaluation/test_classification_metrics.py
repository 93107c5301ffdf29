"""Accuracy of classes by hand."""

import pytest

from mplug_jax.evaluation.classification import classification_accuracy


def test_accuracy_by_id():
    labels = {"a": 0, "b": 2, "c": 1, "d": 1}
    assert classification_accuracy({"d": 1, "a": 0, "b": 1, "c": 1}, labels) == {"accuracy": 75.0}
    names = {1: "entailment", 2: "neutral"}
    assert classification_accuracy({2: "neutral", 1: "neutral"}, names) == {"accuracy": 50.0}


def test_a_name_against_a_number_raises():
    with pytest.raises(ValueError, match="prediction of 'x' is 1, its label 'True'"):
        classification_accuracy({"x": 1}, {"x": "True"})
    with pytest.raises(ValueError, match=r"1 prediction \('x'\) missing"):
        classification_accuracy({}, {"x": 1})
