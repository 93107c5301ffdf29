"""Fine-tuning examples, by hand, with a tokenizer whose tokens are letters."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.records import BadSample
from mplug_jax.data.task_examples import (
    CaptionExamples,
    EntailmentExamples,
    PairExamples,
    PhraseExamples,
    PictureExamples,
    QuestionExamples,
    prompt_ids,
)
from mplug_jax.data.tokenizers import encode_words
from mplug_jax.data.transforms import ImageTransform

PAD, CLS, SEP = 0, 2, 3
SIZE = (4, 6)
PLAIN = ImageTransform(SIZE, train=True, crop_scale=None, flip=False, randaugment=False)
FLIPPING = replace(PLAIN, flip=True)
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Letters:
    """One token a letter; a word of digits has none."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id = 200, PAD, 1, CLS, SEP, 4

    def words(self, text):
        return [[ord(c) for c in word if c.isalpha()] for word in text.split()]

    def encode(self, text, max_length):
        return encode_words(self, self.words(text), max_length)

    def decode(self, ids):
        return "".join(map(chr, ids))


def record(**fields: Any) -> dict[str, Any]:
    return {"id": "the record", "image": IMAGE, "image_id": 7, "captions": [], **fields}


def shown(ids: np.ndarray, mask: np.ndarray) -> str:
    """The real ids, special ones as ^ ([CLS]) and | ([SEP]); mask and padding must fit."""
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    length = int(mask.sum())
    assert mask[:length].all() and (ids[length:] == PAD).all()
    return "".join({CLS: "^", SEP: "|"}.get(i, chr(i)) for i in ids[:length])


def text(example: dict[str, Any], name: str = "text") -> str:
    return shown(example[f"{name}_ids"], example[f"{name}_mask"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_prompt_is_cls_and_its_words():
    prompt = prompt_ids(Letters(), "a b1 cd")
    assert prompt.dtype == np.int32 and prompt.tolist() == [CLS, *map(ord, "abcd")]
    assert prompt_ids(Letters(), "").tolist() == [CLS]


def test_pictures_come_alone():
    example = PictureExamples(ImageTransform(SIZE))(record())
    assert set(example) == {"image", "image_id"}
    np.testing.assert_array_equal(example["image"], IMAGE)
    assert example["image_id"] == 7 and example["image_id"].dtype == np.int32
    clip = np.stack([IMAGE + 10 * i for i in range(6)])
    example = PictureExamples(ImageTransform(SIZE), frames=3)(record(video=clip))
    np.testing.assert_array_equal(example["image"], clip[::2])
    with pytest.raises(BadSample, match="the record: is a picture"):
        PictureExamples(ImageTransform(SIZE), frames=3)(record())


def test_captions_follow_the_prompt():
    maker = CaptionExamples(Letters(), PLAIN, 9, prompt="of a")
    example = maker(record(captions=["ab c"]), rng())
    assert text(example, "caption") == "^ofaabc|"
    np.testing.assert_array_equal(example["image"], IMAGE)
    assert example["image_id"] == 7
    # One without room is cut and has no [SEP], since it has not ended.
    assert text(maker(record(captions=["ab cd"]), rng()), "caption") == "^ofaabcd|"
    assert text(maker(record(captions=["ab cde"]), rng()), "caption") == "^ofaabcde"
    assert text(maker(record(captions=["ab cdef"]), rng()), "caption") == "^ofaabcde"


def test_captions_are_drawn_uniformly():
    maker = CaptionExamples(Letters(), PLAIN, 9)
    captions = record(captions=["a", "b", "c"])
    drawn = Counter(text(maker(captions, rng(seed)), "caption") for seed in range(600))
    assert set(drawn) == {"^a|", "^b|", "^c|"}
    assert all(160 < count < 240 for count in drawn.values())


def test_a_prompt_without_room_for_a_caption_is_refused():
    CaptionExamples(Letters(), PLAIN, 5, prompt="abc")
    with pytest.raises(ValueError, match=r"4 tokens have no room .* 'abc' \(4 tokens\)"):
        CaptionExamples(Letters(), PLAIN, 4, prompt="abc")


def question(**fields: Any) -> dict[str, Any]:
    return record(questions=[{"question": "is it", **fields}])


def test_questions_with_their_context():
    maker = QuestionExamples(Letters(), PLAIN, 16, 6, answers=1)
    whole = question(ocr=["st", "op"], objects="car dog", answers={"no": 1.0})
    assert text(maker(whole, rng())) == "^isit|stop|card|"
    assert text(replace(maker, text_length=20)(whole, rng())) == "^isit|stop|cardog|"
    assert text(replace(maker, context=False)(whole, rng())) == "^isit|"
    for fields in ({}, {"ocr": [], "objects": ""}, {"ocr": ["12"]}, {"ocr": None}):
        assert text(maker(question(**fields), rng())) == "^isit|"
    assert text(maker(question(objects="car"), rng())) == "^isit|car|"


def test_the_most_frequent_answers_come_with_their_weights():
    maker = QuestionExamples(Letters(), PLAIN, 16, 5, answers=2)
    given = {"no": 0.3, "yes": 0.6, "maybe": 0.1}
    example = maker(question(answers=given), rng())
    rows = zip(example["answer_ids"], example["answer_mask"], strict=True)
    assert [shown(*row) for row in rows] == ["^yes|", "^no|"]
    assert example["answer_weights"].dtype == np.float32
    np.testing.assert_array_equal(example["answer_weights"], np.float32([0.6, 0.3]))
    # Fewer answers leave rows without weight; none are needed where a question is only asked.
    for answers, weights in (({"no": 0.3}, [0.3, 0.0]), ({}, [0.0, 0.0])):
        example = maker(question(answers=answers), rng())
        np.testing.assert_array_equal(example["answer_weights"], np.float32(weights))
        assert example["answer_ids"].shape == example["answer_mask"].shape == (2, 5)
        assert shown(example["answer_ids"][1], example["answer_mask"][1]) == "^"
    tied = maker(question(answers={"no": 0.3, "yes": 0.3, "b": 0.3}), rng())
    assert shown(tied["answer_ids"][0], tied["answer_mask"][0]) == "^no|"


def test_one_of_several_questions_is_drawn_in_training_alone():
    maker = QuestionExamples(Letters(), PLAIN, 16, 5, answers=1)
    asked = record(questions=[{"question": q} for q in "abc"])
    drawn = Counter(text(maker(asked, rng(seed))) for seed in range(600))
    assert set(drawn) == {"^a|", "^b|", "^c|"}
    assert all(160 < count < 240 for count in drawn.values())
    assert text(replace(maker, transform=ImageTransform(SIZE))(asked)) == "^a|"


def test_boxes_become_centre_and_size():
    maker = PhraseExamples(Letters(), BoxTransform(SIZE), 8)
    phrases = [{"phrase": "the dog", "box": [0.25, 0.5, 0.75, 0.625]}]
    example = maker(record(phrases=phrases))
    assert text(example) == "^thedog|"
    assert example["box"].dtype == np.float32
    np.testing.assert_array_equal(example["box"], np.float32([0.5, 0.5625, 0.5, 0.125]))
    np.testing.assert_array_equal(example["image"], IMAGE)


def test_box_and_phrase_are_those_of_the_mirrored_picture():
    maker = PhraseExamples(Letters(), BoxTransform(SIZE, train=True, flip=True), 12)
    phrases = [{"phrase": "left dog", "box": [0.0, 0.5, 0.25, 1.0]}]
    examples = [maker(record(phrases=phrases), rng(seed)) for seed in range(20)]
    seen = set()
    for example in examples:
        mirrored = text(example) == "^rightdog|"
        image, centre = (IMAGE[:, ::-1], 0.875) if mirrored else (IMAGE, 0.125)
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["box"], np.float32([centre, 0.75, 0.25, 0.5]))
        assert mirrored or text(example) == "^leftdog|"
        seen.add(mirrored)
    assert seen == {True, False}


def test_pairs_are_two_pictures_that_are_never_mirrored():
    maker = PairExamples(Letters(), FLIPPING, 8)
    pair = {"image2": 255 - IMAGE, "sentence": "the left", "label": True}
    for seed in range(8):
        example = maker(record(pair=pair), rng(seed))
        np.testing.assert_array_equal(example["image"], np.stack([IMAGE, 255 - IMAGE]))
    assert text(example) == "^thelef|"
    assert example["label"] == 1 and example["label"].dtype == np.int32
    assert maker(record(pair={**pair, "label": False}), rng())["label"] == 0


def test_entailment_is_the_place_of_its_label():
    maker = EntailmentExamples(Letters(), PLAIN, 8)
    for place, label in enumerate(("entailment", "neutral", "contradiction")):
        example = maker(record(entailment={"hypothesis": "so be", "label": label}), rng())
        assert example["label"] == place and example["label"].dtype == np.int32
        assert text(example) == "^sobe|"
    with pytest.raises(BadSample, match="the record: label 'perhaps' is none of"):
        maker(record(entailment={"hypothesis": "so", "label": "perhaps"}), rng())


QUESTIONS = QuestionExamples(Letters(), PLAIN, 8, 6, answers=1)
PHRASES = PhraseExamples(Letters(), BoxTransform(SIZE), 8)
PAIRS = PairExamples(Letters(), PLAIN, 8)
HYPOTHESES = EntailmentExamples(Letters(), PLAIN, 8)


@pytest.mark.parametrize(
    ("maker", "fields", "message"),
    [
        (CaptionExamples(Letters(), PLAIN, 8), {}, "has 0 captions"),
        (CaptionExamples(Letters(), PLAIN, 8), {"captions": ["12"]}, "'12' has no words"),
        (QUESTIONS, {}, "has no questions"),
        (QUESTIONS, {"questions": [{"question": "7", "ocr": ["stop"]}]}, "question '7' has no"),
        (QUESTIONS, {"questions": [{"question": "", "objects": "car"}]}, "question '' has no"),
        (PHRASES, {"phrases": []}, "has no phrases"),
        (PHRASES, {"phrases": [{"phrase": "1", "box": [0, 0, 1, 1]}]}, "'1' has no words"),
        (PAIRS, {}, "has no pair"),
        (PAIRS, {"pair": {"image2": IMAGE, "sentence": "", "label": True}}, "'' has no words"),
        (HYPOTHESES, {}, "has no entailment"),
        (HYPOTHESES, {"entailment": {"hypothesis": "", "label": "neutral"}}, "'' has no words"),
    ],
)
def test_records_without_what_the_task_needs_are_bad_samples(maker, fields, message):
    with pytest.raises(BadSample, match=f"the record: .*{message}"):
        maker(record(**fields), rng())


def test_unreadable_pictures_are_bad_samples():
    pair = {"image2": "/nowhere/gone.jpg", "sentence": "so", "label": True}
    with pytest.raises(BadSample, match=r"gone\.jpg: no such file"):
        PAIRS(record(pair=pair), rng())
    for maker, fields in (
        (PictureExamples(PLAIN), {}),
        (CaptionExamples(Letters(), PLAIN, 8), {"captions": ["a"]}),
        (QUESTIONS, {"questions": [{"question": "so"}]}),
        (PHRASES, {"phrases": [{"phrase": "so", "box": [0, 0, 1, 1]}]}),
        (HYPOTHESES, {"entailment": {"hypothesis": "so", "label": "neutral"}}),
    ):
        with pytest.raises(BadSample, match=r"gone\.jpg: no such file"):
            maker(record(image="/nowhere/gone.jpg", **fields), rng())


def test_features_take_the_place_of_the_picture_and_its_mirror_image():
    features = np.stack([np.full((5, 3), variant, np.float16) for variant in (0, 1)])
    phrase = {"phrase": "the left dog", "box": [0.1, 0.2, 0.4, 1.3]}
    question = {"question": "what", "answers": {"dog": 1.0}}
    item = record(features=features, phrases=[phrase], questions=[question], captions=["a dog"])
    makers = (
        CaptionExamples(Letters(), PLAIN, 9),
        QuestionExamples(Letters(), PLAIN, 9, 4, 1),
        PhraseExamples(Letters(), BoxTransform(SIZE, train=True, flip=True), 14),
    )
    for maker in makers:
        drawn = [maker(item, rng(seed)) for seed in range(20)]
        assert {x["image"].shape for x in drawn} == {(5, 3)}
        assert {float(x["image"][0, 0]) for x in drawn} == {0.0, 1.0}
    for example in drawn:  # phrases: the box and the side follow the picture
        mirrored = example["image"][0, 0] == 1
        assert text(example) == ("^therightdog|" if mirrored else "^theleftdog|")
        centre = 0.75 if mirrored else 0.25
        np.testing.assert_allclose(example["box"], [centre, 0.6, 0.3, 0.8], atol=1e-6)
