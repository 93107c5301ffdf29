"""Pre-training and evaluation examples with a tokenizer whose ids are its words' numbers."""

from collections import Counter

import numpy as np
import pytest

from mplug_jax.data.examples import EvalExamples, PretrainExamples
from mplug_jax.data.records import BadSample
from mplug_jax.data.tokenizers import encode_words
from mplug_jax.data.transforms import ImageTransform

PAD, CLS, SEP = 0, 2, 3
PLAIN = ImageTransform((4, 6), train=True, crop_scale=None, flip=False, randaugment=False)


class Letters:
    """One token a letter; a word of digits has none."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id = 200, PAD, 1, CLS, SEP, 4

    def words(self, text):
        return [[ord(c) for c in word if c.isalpha()] for word in text.split()]

    def encode(self, text, max_length):
        return encode_words(self, self.words(text), max_length)

    def decode(self, ids):
        return "".join(map(chr, ids))


def record(*captions, image=None):
    pixels = np.full((4, 6, 3), 9, np.uint8) if image is None else image
    return {"id": "the record", "image": pixels, "image_id": 7, "captions": list(captions)}


def tokens(example, name):
    """The real ids of a text field, after checking that mask and padding fit together."""
    ids, mask = example[f"{name}_ids"], example[f"{name}_mask"]
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    length = int(mask.sum())
    assert mask[:length].all() and (ids[length:] == PAD).all()
    return ids[:length].tolist()


def make(captions, seed=0, text_length=12, target_length=12, **options):
    maker = PretrainExamples(Letters(), PLAIN, text_length, target_length, **options)
    return maker(record(*captions), np.random.default_rng(seed))


def test_prefix_and_target_are_the_caption_cut_between_words():
    caption = [ord(c) for c in "abcdef"]
    splits = Counter()
    for seed in range(600):
        example = make(["ab c def"], seed)
        assert tokens(example, "text") == [CLS, *caption, SEP]
        prefix, target = tokens(example, "prefix"), tokens(example, "target")
        assert prefix[0] == target[0] == CLS and prefix[-1] == target[-1] == SEP
        assert prefix[1:-1] + target[1:-1] == caption
        splits[len(prefix) - 2] += 1
    # 0, 1 or 2 words, of 2, 1 and 3 letters, are prefix: each a third of the time.
    assert set(splits) == {0, 2, 3}
    assert all(160 < count < 240 for count in splits.values())


def test_the_other_fields():
    example = make(["a"])
    np.testing.assert_array_equal(example["image"], record()["image"])
    assert example["image"].dtype == np.uint8
    assert example["image_id"] == 7 and example["image_id"].dtype == np.int32
    assert tokens(example, "prefix") == [CLS, SEP]
    assert tokens(example, "target") == [CLS, ord("a"), SEP]


def test_empty_prefix_probability():
    empty = [len(tokens(make(["a b c d"], s, empty_prefix=1.0), "prefix")) == 2 for s in range(20)]
    assert all(empty)
    half = [len(tokens(make(["a b c d"], s, empty_prefix=0.5), "prefix")) == 2 for s in range(600)]
    assert np.mean(half) == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


def test_captions_are_drawn_uniformly():
    drawn = Counter(tokens(make(["a", "b", "c"], seed), "text")[1] for seed in range(600))
    assert set(drawn) == {ord("a"), ord("b"), ord("c")}
    assert all(160 < count < 240 for count in drawn.values())


def test_a_long_caption_is_cut_at_a_word_and_its_target_left_open():
    for seed in range(30):
        example = make(["ab cd efg"], seed, text_length=8)  # room for 6 of 7 tokens
        assert tokens(example, "text") == [CLS, *map(ord, "abcd"), SEP]
        prefix, target = tokens(example, "prefix"), tokens(example, "target")
        assert prefix[1:-1] + target[1:] == list(map(ord, "abcd"))
    single = make(["abcdefgh"], text_length=5)
    assert tokens(single, "text") == [CLS, *map(ord, "abc"), SEP]


def test_a_target_without_room_has_no_sep():
    example = make(["ab cd ef"], empty_prefix=1.0, target_length=5)
    assert tokens(example, "target") == [CLS, *map(ord, "abcd")]
    exact = make(["ab cd ef"], empty_prefix=1.0, target_length=8)
    assert tokens(exact, "target") == [CLS, *map(ord, "abcdef"), SEP]


def test_words_without_tokens_are_no_words():
    for seed in range(20):
        example = make(["a 12 b"], seed)
        assert len(tokens(example, "target")) > 2


@pytest.mark.parametrize("captions", [[], [""], ["  "], ["12 34"]])
def test_unusable_captions_are_bad_samples(captions):
    with pytest.raises(BadSample, match="the record"):
        make(captions)
    with pytest.raises(BadSample, match="the record"):
        EvalExamples(Letters(), ImageTransform((4, 6)), 12)(record(*captions))


def test_an_unreadable_image_is_a_bad_sample():
    maker = PretrainExamples(Letters(), PLAIN, 12, 12)
    with pytest.raises(BadSample, match=r"gone\.jpg"):
        maker(record("a", image="/nowhere/gone.jpg"), np.random.default_rng(0))


def test_eval_examples_take_the_caption_they_are_told():
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    for index in (0, 1):
        maker = EvalExamples(Letters(), ImageTransform((4, 6)), 6, caption_index=index)
        example = maker(record("abcdef", "g h", image=pixels))
        assert example["image"].shape == (4, 6, 3) and example["image_id"] == 7
        assert tokens(example, "text") == [CLS, *map(ord, ["abcd", "gh"][index]), SEP]
    with pytest.raises(BadSample, match="number 2"):
        EvalExamples(Letters(), ImageTransform((4, 6)), 6, caption_index=2)(record("a", "b"))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="target_length"):
        PretrainExamples(Letters(), PLAIN, 12, 2)
    with pytest.raises(ValueError, match="empty_prefix"):
        PretrainExamples(Letters(), PLAIN, 12, 12, empty_prefix=1.5)
    with pytest.raises(ValueError, match="train=False"):
        EvalExamples(Letters(), PLAIN, 12)
