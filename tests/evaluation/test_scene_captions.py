"""Averages of verdicts with their own denominators; the verdicts themselves are tested where
they are made."""

import pytest

from mplug_jax.data.sources.scene_language import captions as true_captions
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.evaluation import scene_captions

RIGHT = {"attributes": True, "colour": True, "shape": True, "count": True}
VERDICTS = {
    "all right": {**RIGHT, "relation": True},
    "wrong colour": {**RIGHT, "attributes": False, "colour": False},
    "wrong relation": {**RIGHT, "relation": False, "size": True},
    "nothing": dict.fromkeys(RIGHT, False),
}


@pytest.fixture
def verdicts(monkeypatch):
    def check(layout, text):
        assert layout == f"scene of {text}"
        return VERDICTS[text]

    monkeypatch.setattr(scene_captions, "check_caption", check)


@pytest.mark.usefixtures("verdicts")
def test_each_accuracy_has_its_own_denominator():
    captions = list(VERDICTS)
    metrics = scene_captions.attribute_accuracy([f"scene of {c}" for c in captions], captions)
    assert metrics == pytest.approx(
        {
            "attribute_accuracy": 2 / 4,
            "colour_accuracy": 2 / 4,
            "shape_accuracy": 3 / 4,
            "count_accuracy": 3 / 4,
            "size_accuracy": 1.0,
            "relation_accuracy": 1 / 2,
            "relation_claims": 2 / 4,
        }
    )


@pytest.mark.usefixtures("verdicts")
def test_claims_nobody_makes_are_left_out():
    metrics = scene_captions.attribute_accuracy(["scene of nothing"], ["nothing"])
    assert set(metrics) == {
        *("attribute_accuracy", "colour_accuracy", "shape_accuracy", "count_accuracy"),
        "relation_claims",
    }
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(("layouts", "captions"), [([], []), (["scene"], ["a", "b"])])
def test_unequal_or_empty_lists_raise(layouts, captions):
    with pytest.raises(ValueError, match="captions have to be as many"):
        scene_captions.attribute_accuracy(layouts, captions)


def test_true_captions_are_right_and_those_of_other_scenes_are_not():
    source = Scenes("full", "train", size=60)
    layouts = [source.layout(i) for i in range(60)]
    pairs = [(layout, text) for layout in layouts for text in true_captions(layout)]
    # Not every true caption names every object, but none is wrong about a relation or a place.
    metrics = scene_captions.attribute_accuracy(*zip(*pairs, strict=True))
    assert metrics["attribute_accuracy"] > 0.5
    assert metrics["relation_accuracy"] == metrics["place_accuracy"] == 1.0
    canonical = [true_captions(layout)[0] for layout in layouts]
    assert scene_captions.attribute_accuracy(layouts, canonical)["attribute_accuracy"] == 1.0
    others = scene_captions.attribute_accuracy(layouts, canonical[1:] + canonical[:1])
    assert others["attribute_accuracy"] < 0.1
