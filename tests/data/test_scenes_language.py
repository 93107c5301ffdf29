"""Captions say what is there, and the checker finds what is wrong in a caption."""

import random
import re
from dataclasses import replace

import pytest

from mplug_jax.data.sources.scene_language import (
    NUMBERS,
    PLURALS,
    VOCABULARY,
    captions,
    check_caption,
    join,
    parse,
)
from mplug_jax.data.sources.scene_layout import LEVELS, Background, Layout, SceneObject
from mplug_jax.data.sources.scenes import Scenes

levels = pytest.mark.parametrize("level", list(LEVELS))
COUNT = 500


def layouts(level: str, count: int = COUNT) -> list[Layout]:
    source = Scenes(level, "train")
    return [source.layout(i) for i in range(count)]


def thing(size: str, colour: str, shape: str, cx: float, cy: float) -> SceneObject:
    return SceneObject(shape, colour, size, cx, cy, 6.0, 0.0, (1.0, 1.0, 1.0))


def scene(*objects: SceneObject, level: str = "full") -> Layout:
    return Layout(level, objects, Background((0, 0, 0), (0, 0, 0), 0.0), 0)


@levels
def test_every_caption_is_right(level):
    seen = set()
    for layout in layouts(level):
        for caption in captions(layout):
            result = check_caption(layout, caption)
            assert all(result.values()), (caption, result)
            seen |= result.keys()
    assert seen == {"attributes", "colour", "shape", "count", "size", "place", "relation"}


@levels
def test_form_of_captions(level):
    longest = {"easy": 16, "full": 30}[level]
    known = {w for words in VOCABULARY.values() for phrase in words for w in phrase.split()}
    known |= {"a", "an", "and", "there", "is", "with", "object", "objects", ","}
    for layout in layouts(level):
        told = captions(layout)
        assert len(set(told)) == len(told) >= 4
        for caption in told:
            words = caption.split(" ")
            assert set(words) <= known
            assert len(words) <= longest
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_captions_of_known_scenes():
    red = thing("large", "red", "circle", 10, 10)
    blue = thing("small", "blue", "square", 50, 14)
    assert captions(scene(red)) == [
        "a large red circle at the top left",
        "a large red circle",
        "a red circle at the top left",
        "there is one object , a red circle",
    ]
    assert captions(scene(red, blue)) == [
        "a large red circle to the left of a small blue square",
        "a large red circle and a small blue square",
        "a red circle at the top left and a blue square at the top right",
        "a blue square to the right of a red circle",
        "two objects , a red circle and a blue square",
    ]
    twin = thing("medium", "red", "circle", 32, 32)
    star = thing("small", "orange", "star", 48, 60)
    assert captions(scene(red, twin, star)) == [
        "a large red circle top left , a medium red circle center , "
        "a small orange star bottom right",
        "a large red circle , a medium red circle and a small orange star",
        "a red circle at the top left , a red circle in the middle and "
        "an orange star at the bottom right",
        "a red circle above an orange star , with a red circle",
        "an orange star below a red circle , with a red circle",
        "three objects , two red circles and one orange star",
    ]


def change_word(caption: str, choices: tuple[str, ...], rng: random.Random) -> str:
    """Replaces one of the words that are in `choices` by another of them."""
    words = caption.split()
    at = rng.choice([i for i, word in enumerate(words) if word in choices])
    words[at] = rng.choice([c for c in choices if c != words[at]])
    return " ".join(words)


@levels
def test_wrong_words_are_found(level):
    spec, rng = LEVELS[level], random.Random(0)
    for layout in layouts(level, 200):
        canonical, attributes, *_ = captions(layout)
        colour = check_caption(layout, change_word(canonical, spec.colours, rng))
        assert (colour["attributes"], colour["colour"], colour["shape"]) == (False, False, True)
        shape = check_caption(layout, change_word(canonical, spec.shapes, rng))
        assert (shape["attributes"], shape["colour"], shape["shape"]) == (False, True, False)
        size = check_caption(layout, change_word(attributes, tuple(spec.sizes), rng))
        assert size["attributes"]
        if len({o.kind[1:] for o in layout.objects}) == len(layout.objects):
            assert not size["size"]


@levels
def test_wrong_counts_are_found(level):
    for layout in layouts(level, 200):
        n = len(layout.objects)
        counted = captions(layout)[-1]
        assert not check_caption(layout, counted.replace(NUMBERS[n], NUMBERS[n + 1], 1))["count"]
        more = check_caption(layout, f"{captions(layout)[1]} and a red circle")
        assert not more["count"]
        assert not more["attributes"]
    twins = scene(thing("small", "red", "star", 10, 10), thing("large", "red", "star", 40, 40))
    assert check_caption(twins, "two red stars")["count"]
    assert check_caption(twins, "two red stars")["attributes"]
    assert not check_caption(twins, "three red stars")["count"]
    assert not check_caption(twins, "one red star")["attributes"]


@levels
def test_wrong_places_are_found(level):
    spec = LEVELS[level]
    for layout in layouts(level, 200):
        # The picture turned by half: every object but one in the middle is elsewhere.
        turned = replace(
            layout,
            objects=tuple(
                replace(o, cx=spec.pixels - o.cx, cy=spec.pixels - o.cy) for o in layout.objects
            ),
        )
        cells = [layout.cell(i) for i in range(len(layout.objects))]
        if (1, 1) in cells or len(cells) != 1:
            continue
        for caption in (captions(layout)[0], captions(layout)[2]):
            result = check_caption(turned, caption)
            assert not result["place"]
            assert result["attributes"]


@levels
def test_wrong_relations_are_found(level):
    pairs = [x for x in layouts(level) if len(x.objects) == 2]
    for layout in pairs[:100]:
        direct, inverse = captions(layout)[0], captions(layout)[3]
        for caption in (direct, inverse):
            claim = next(r for r in VOCABULARY["relations"] if r in caption)
            for other in VOCABULARY["relations"]:
                result = check_caption(layout, caption.replace(claim, other))
                assert result["relation"] == (other == claim)
                assert result["attributes"]


def test_swapped_colours_break_the_binding_alone():
    layout = scene(thing("small", "red", "star", 10, 10), thing("large", "blue", "ring", 50, 12))
    result = check_caption(layout, "a small blue star to the left of a large red ring")
    assert result["colour"]
    assert result["shape"]
    assert result["count"]
    assert not result["attributes"]
    assert not result["size"]
    assert not result["relation"]


def test_twins_may_be_told_in_any_order():
    layout = scene(
        thing("small", "red", "star", 10, 10),
        thing("large", "red", "star", 50, 12),
        thing("small", "red", "ring", 50, 50),
    )
    right = "a large red star top right , a small red star top left and a small red ring"
    assert all(check_caption(layout, right).values())
    wrong = "a large red star top right , a large red star top left and a small red ring"
    assert not check_caption(layout, wrong)["size"]
    assert check_caption(layout, wrong)["place"]
    assert all(check_caption(layout, "a red ring below a red star , with a red star").values())
    assert not check_caption(layout, "a red ring above a red star , with a red star")["relation"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "red",
        "circle",
        "red red red circle blue",
        "to the left of",
        "to the left of a red circle",
        "a red circle to the left of",
        "at the top left",
        "two two objects objects",
        "eight red circles and eight blue circles above eight rings on the left",
        "[UNK] ##x Ünïcode ??? .",
    ],
)
def test_any_text_can_be_checked(text):
    layout = scene(thing("large", "red", "circle", 10, 10), thing("small", "blue", "star", 50, 14))
    result = check_caption(layout, text)
    assert {"attributes", "colour", "shape", "count"} <= result.keys()
    assert not result["attributes"]


def test_word_salad():
    rng = random.Random(1)
    words = [w for group in VOCABULARY.values() for phrase in group for w in phrase.split()]
    for layout in layouts("full", 100):
        text = " ".join(rng.choices(words, k=rng.randrange(40)))
        assert all(isinstance(v, bool) for v in check_caption(layout, text).values())


def test_a_claim_is_only_judged_where_it_is_made():
    layout = scene(thing("large", "red", "circle", 10, 10))
    assert check_caption(layout, "a red circle").keys() == {
        "attributes",
        "colour",
        "shape",
        "count",
    }
    assert "size" in check_caption(layout, "a large red circle")
    assert "place" in check_caption(layout, "a red circle on the left")
    assert "relation" in check_caption(layout, "a red circle above a blue star")


def test_a_colour_without_a_shape_is_an_object_of_its_own():
    layout = scene(thing("large", "red", "circle", 10, 10))
    result = check_caption(layout, "a red circle and a blue")
    assert not result["colour"]
    assert not result["attributes"]
    assert not check_caption(layout, "a blue red circle")["attributes"]


def test_parse_takes_captions_apart():
    claims = parse("three objects , two large red crosses and one blue ring at the top")
    assert claims.total == 3
    crosses, ring = claims.mentions
    assert (crosses.number, crosses.size, crosses.colour, crosses.shape) == (
        2,
        "large",
        "red",
        "cross",
    )
    assert (ring.number, ring.colour, ring.shape, ring.cell) == (1, "blue", "ring", (1, 0))
    claims = parse("a red ring to the left of a blue ring below a red star on the left")
    assert claims.relations == [(0, "left", 1), (1, "below", 2)]
    assert claims.mentions[2].cell == (0, 1)


def test_lists_and_plurals():
    assert [join(["a"]), join(["a", "b"]), join(["a", "b", "c"])] == [
        "a",
        "a and b",
        "a , b and c",
    ]
    assert PLURALS["cross"] == "crosses"
    assert PLURALS["star"] == "stars"
