"""Transforms of one source of a mixture: its pictures alone are treated in another way."""

import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mplug_jax.data.augmented import Augmented, checked_transforms, made_for
from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.inspection.samples import sample
from mplug_jax.data.inspection.survey import NamedSource
from mplug_jax.data.pipeline import eval_batches, train_iterator
from mplug_jax.data.sources import build_mixture, build_source
from mplug_jax.data.task_examples import PairExamples, PhraseExamples, PictureExamples
from mplug_jax.data.transforms import ImageTransform

SIZE = (16, 16)
# Left and right differ, so that flips and crops show.
PICTURES = {
    name: np.linspace(low, low + 100, 16 * 16 * 3).reshape(16, 16, 3).round().astype(np.uint8)
    for name, low in (("plain", 0), ("other", 140))
}
AS_IT_IS = {"flip": False, "crop_scale": None, "randaugment": False}


@pytest.fixture
def root(tmp_path):
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        rows = [{"image": f"{name}.png", "captions": ["a"]}, {"image": "x.png", "captions": [""]}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def spec(name, **keys):
    return {"kind": "jsonl", "path": f"{name}.jsonl", "max_bad_fraction": 0.5, **keys}


def drawn(mixture, transform, count=8):
    """Training pictures of the first and of the second source."""
    iterator = train_iterator(mixture, PictureExamples(transform), seed=0, batch_size=16, threads=0)
    pictures = np.concatenate([next(iterator)["image"] for _ in range(count)])
    iterator.close()
    bright = pictures.reshape(len(pictures), -1).min(1) >= 140
    return pictures[~bright], pictures[bright]


def test_one_source_is_flipped_and_the_other_is_not(root):
    mixture = build_mixture([spec("plain", transforms=AS_IT_IS), spec("other")], root)
    transform = ImageTransform(SIZE, True, crop_scale=None, flip=True, randaugment=False)
    plain, other = drawn(mixture, transform)
    assert len(plain) == len(other) == 64
    np.testing.assert_array_equal(plain, np.broadcast_to(PICTURES["plain"], plain.shape))
    flipped = (other == PICTURES["other"][:, ::-1]).all((1, 2, 3))
    assert 16 < flipped.sum() < 48
    np.testing.assert_array_equal(other[~flipped][0], PICTURES["other"])


@pytest.mark.parametrize("given", [{"crop_scale": [0.2, 0.3]}, {"randaugment": True}])
def test_one_source_is_augmented_where_the_config_augments_none(root, given):
    mixture = build_mixture([spec("plain", transforms=given), spec("other")], root)
    plain, other = drawn(mixture, ImageTransform(SIZE, True, None, False, False), count=2)
    assert len({picture.tobytes() for picture in plain}) > 8
    np.testing.assert_array_equal(other, np.broadcast_to(PICTURES["other"], other.shape))


def test_what_a_source_does_not_set_is_the_configs(root):
    """Without transforms, and with the very settings of the config, the pictures are the same."""
    transform = ImageTransform(SIZE, True, crop_scale=(0.3, 0.9), flip=True, randaugment=True)
    [plain] = [source for source, _ in build_mixture(spec("plain"), root)]
    same = Augmented(plain, {"flip": True})
    for left, right in zip(
        drawn([(plain, 1.0)], transform), drawn([(same, 1.0)], transform), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_evaluation_and_the_sources_own_report_are_untouched(root):
    [(source, weight)] = build_mixture(spec("plain", transforms={"flip": True}), root)
    assert (len(source), weight) == (1, 1.0)
    assert [reason for _, reason in source.bad_records] == ["caption 0 is empty"]
    assert source.left_out == 0 and source[0]["captions"] == ["a"]
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    [batch] = eval_batches(source, PictureExamples(ImageTransform(SIZE)), 1)
    np.testing.assert_array_equal(batch["image"][0], PICTURES["plain"])


def test_inspection_shows_what_training_gets(root):
    [(source, _)] = build_mixture(spec("plain", transforms=AS_IT_IS), root)
    seen = []

    def show(record, example):
        seen.append(example["image"])

    named = NamedSource("data.train[0]", source, {}, False, 0.5)
    make_example = PictureExamples(ImageTransform(SIZE, True))
    for seed in range(4):
        assert sample(named, make_example, 1, seed, show, 1).tried == 1
    np.testing.assert_array_equal(seen, [PICTURES["plain"]] * 4)


def test_transforms_of_boxes_take_the_settings_that_they_have(root):
    source = Augmented(build_source(spec("plain"), root), {"flip": True, "randaugment": False})
    made = made_for(source, PhraseExamples(None, BoxTransform(SIZE, True), 8))
    assert made.transform == BoxTransform(SIZE, True, flip=True)


def test_pairs_are_never_flipped(root):
    pictures = [root / "plain.png", root / "other.png"]
    record = {
        "id": "a",
        "image": str(pictures[0]),
        "image_id": 0,
        "pair": {"image2": str(pictures[1]), "sentence": "left", "label": True},
    }

    class Words:
        cls_id, sep_id, pad_id = 1, 2, 0

        def words(self, text):
            return [[3]]

    transform = ImageTransform(SIZE, True, None, False, False)
    maker = made_for(Augmented([record], {"flip": True}), PairExamples(Words(), transform, 4))
    for seed in range(8):
        image = maker(record, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(image, [PICTURES["plain"], PICTURES["other"]])


def test_makers_without_a_transform_are_told(root):
    source = Augmented(build_source(spec("plain"), root), {"flip": True})
    with pytest.raises(ValueError, match=r"sets transforms \{'flip': True\}, but .* has no"):
        made_for(source, lambda record, rng: {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"randaug": True}, "have no 'randaug'; did you mean 'randaugment'\\? Choose from crop"),
        ({"size": 3}, "have no 'size'; Choose from crop_scale, decoder, flip, randaugment"),
        ("flip", "are 'flip', not a dict of settings"),
        ({"flip": "no"}, "flip is 'no', not True or False"),
        ({"crop_scale": 0.5}, "crop_scale is 0.5, not None or two numbers"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale must be 0 < low <= high <= 1"),
        ({"decoder": "quick"}, "decoder must be one of pillow, fast, not 'quick'"),
    ],
)
def test_mistakes_are_found_before_a_file_is_opened(given, said):
    with pytest.raises(ValueError, match=said):
        build_mixture([{"kind": "jsonl", "path": "lost.jsonl", "transforms": given}])


def test_a_configdict_will_do():
    assert checked_transforms(ConfigDict({"crop_scale": [0.5, 1]})) == {"crop_scale": (0.5, 1.0)}
    assert checked_transforms(ConfigDict({"flip": False})) == {"flip": False}


def test_a_held_out_source_takes_no_transforms(root):
    with pytest.raises(ValueError, match="a 'jsonl' source has no key 'transforms'"):
        build_source(spec("plain", transforms={"flip": False}), root)
