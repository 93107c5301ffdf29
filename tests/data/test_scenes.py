"""The source itself: determinism, splits, balance, errors."""

import pickle
import re
from collections import Counter

import numpy as np
import pytest

from mplug_jax.data.sources.scene_drawing import draw
from mplug_jax.data.sources.scene_language import captions
from mplug_jax.data.sources.scene_layout import LEVELS, SPLITS, layout_key, split_of
from mplug_jax.data.sources.scenes import DEFAULT_SIZES, FIELDS, Scenes

levels = pytest.mark.parametrize("level", list(LEVELS))


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@levels
@pytest.mark.parametrize("split", SPLITS)
def test_records_depend_on_the_index_alone(level, split):
    forward = Scenes(level, split, size=50, fields=FIELDS)
    first = [forward[i] for i in range(6)]
    backward = pickle.loads(pickle.dumps(Scenes(level, split, size=50, fields=FIELDS)))
    for i in reversed(range(6)):
        assert equal(backward[i], first[i])
    assert equal(pickle.loads(pickle.dumps(forward))[np.int64(3)], first[3])
    assert not equal(Scenes(level, split, size=50, seed=1)[0]["image"], first[0]["image"])


@levels
def test_a_size_is_a_prefix(level):
    short, long = Scenes(level, "val", size=10), Scenes(level, "val", size=40)
    assert [short.layout(i) for i in range(10)] == [long.layout(i) for i in range(10)]


@levels
@pytest.mark.parametrize("split", SPLITS)
def test_record_contents(level, split):
    assert len(Scenes(level, split)) == DEFAULT_SIZES[level][split]
    source = Scenes(level, split, size=8, fields=FIELDS)
    record = source[5]
    pixels = {"easy": 32, "full": 64}[level]
    assert record["id"] == f"scenes/{level}/{split}/5"
    assert record["image_id"] == 5
    assert record["image"].shape == (pixels, pixels, 3)
    assert record["image"].dtype == np.uint8
    assert record["image"].flags.c_contiguous
    assert set(FIELDS) <= record.keys()
    assert not {"questions", "clip"} & Scenes(level, split, size=8)[5].keys()
    assert "captions" not in Scenes(level, split, size=8, fields=("phrases",))[5]


@levels
def test_splits_are_disjoint(level):
    said = {}
    for split in SPLITS:
        source = Scenes(level, split)
        count = 2000 if split == "train" else len(source)
        layouts = [source.layout(i) for i in range(count)]
        said[split] = {captions(layout)[0] for layout in layouts}
        # The rule, not luck: a caption of one split can never come in another.
        assert all(split_of(layout_key(layout)) == split for layout in layouts)
    assert not said["train"] & said["val"]
    assert not said["train"] & said["test"]
    assert not said["val"] & said["test"]


@levels
def test_one_canonical_caption_has_one_key(level):
    """The split is decided by a key: it must say as much as the caption, and no more."""
    source = Scenes(level, "train")
    layouts = [source.layout(i) for i in range(2000)]
    by_caption = {captions(layout)[0]: layout_key(layout) for layout in layouts}
    by_key = {layout_key(layout): captions(layout)[0] for layout in layouts}
    assert all(by_caption[captions(x)[0]] == layout_key(x) for x in layouts)
    assert all(by_key[layout_key(x)] == captions(x)[0] for x in layouts)


def test_split_shares():
    counts = Counter(
        split_of(f"full|{size} {colour} {shape}|({column}, {row})")
        for size in LEVELS["full"].sizes
        for colour in LEVELS["full"].colours
        for shape in LEVELS["full"].shapes
        for column in range(3)
        for row in range(3)
    )
    total = counts.total()
    assert total == 1728
    # Four standard deviations around 1/8.
    for split in ("val", "test"):
        assert abs(counts[split] / total - 1 / 8) < 4 * np.sqrt(7 / 64 / total)


@levels
@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_captions_are_unique(level, split):
    source = Scenes(level, split)
    unique = 512 if level == "easy" else len(source)
    said = [captions(source.layout(i))[0] for i in range(unique)]
    assert len(set(said)) == unique


@levels
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("size", [256, 512])
def test_held_out_scenes_are_balanced(level, split, size):
    spec, source = LEVELS[level], Scenes(level, split, size=size)
    layouts = [source.layout(i) for i in range(size)]
    numbers = Counter(len(layout.objects) for layout in layouts)
    if level == "full":
        assert set(numbers.values()) == {size // 4}
    else:
        assert numbers[1] >= 0.1 * size
    objects = [obj for layout in layouts for obj in layout.objects]
    for attribute, names in (("colour", spec.colours), ("shape", spec.shapes)):
        counts = Counter(getattr(obj, attribute) for obj in objects)
        share = len(objects) / len(names)
        assert set(counts) == set(names)
        assert max(abs(n - share) for n in counts.values()) < 0.2 * share


@levels
def test_the_captions_that_tell_sizes_can_be_taken_alone(level):
    all_captions, sized = Scenes(level, "train"), Scenes(level, "train", sized=True)
    for i in range(50):
        captions, n = all_captions[i]["captions"], len(all_captions.layout(i).objects)
        told = [sum(word in LEVELS[level].sizes for word in c.split()) for c in captions]
        assert told == [n, n] + [0] * (len(captions) - 2)
        assert sized[i]["captions"] == captions[:2]


def test_easy_held_out_goes_on_when_its_captions_are_used_up():
    source = Scenes("easy", "test")
    said = [captions(source.layout(i))[0] for i in range(len(source))]
    pictures = {draw(source.layout(i)).tobytes() for i in range(len(source))}
    assert len(set(said)) < len(said) == 1024
    assert len(pictures) == 1024


@levels
def test_training_scenes_use_every_word_evenly(level):
    spec, source = LEVELS[level], Scenes(level, "train")
    objects = [obj for i in range(2000) for obj in source.layout(i).objects]
    for attribute, names in (
        ("colour", spec.colours),
        ("shape", spec.shapes),
        ("size", tuple(spec.sizes)),
    ):
        counts = Counter(getattr(obj, attribute) for obj in objects)
        share = len(objects) / len(names)
        assert set(counts) == set(names)
        assert max(abs(n - share) for n in counts.values()) < 0.2 * share
    numbers = Counter(len(source.layout(i).objects) for i in range(2000))
    assert all(abs(n * spec.max_objects / 2000 - 1) < 0.2 for n in numbers.values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"level": "hard"}, "'hard'; choose one of ['easy', 'full']"),
        ({"split": "dev"}, "'dev'; choose one of ['train', 'val', 'test']"),
        ({"fields": ("captions", "boxes")}, "'phrases'"),
        ({"fields": "captions"}, "choose from"),
        ({"size": 0}, "at least 1"),
    ],
)
def test_errors_name_the_choices(arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Scenes(**{"level": "easy", "split": "train", **arguments})


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_an_error(index):
    with pytest.raises(IndexError, match=r"outside 0\.\.9"):
        Scenes("easy", "val", size=10)[index]
