"""Records to examples for fine-tuning, one maker a task: `(record, rng) -> example`.

In training an item (caption, question, phrase) of the record is drawn uniformly; a record of
`mplug_jax.data.items.Items` has one. Every example has `image` (uint8 [H, W, 3], or the frames of
a clip [T, H, W, 3]) and `image_id` int32. Texts are `[CLS] words [SEP]`, padded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mplug_jax.data.boxes import BoxTransform, inside, mirrored_box, mirrored_phrase
from mplug_jax.data.examples import Example, caption_words, load_image
from mplug_jax.data.records import BadSample, Record, naming
from mplug_jax.data.tokenizers import Tokenizer, encode_words, pad
from mplug_jax.data.transforms import ImageTransform, decode_image


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """int32 [P]: [CLS] and the tokens of the prompt's words."""
    tokens = [token for word in tokenizer.words(prompt) for token in word]
    return np.array([tokenizer.cls_id, *tokens], np.int32)


def _field(record: Mapping[str, Any], field: str) -> Any:
    if not record.get(field):
        raise BadSample(f"{record['id']}: has no {field}")
    return record[field]


def _encoded(
    record: Mapping[str, Any], text: str, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    words = tokenizer.words(text)
    if not any(words):
        raise BadSample(f"{record['id']}: {text!r} has no words")
    return encode_words(tokenizer, words, length)


def _drawn(record: Mapping[str, Any], field: str, rng: np.random.Generator | None) -> Any:
    items = _field(record, field)
    return items[int(rng.integers(len(items)))] if rng is not None and len(items) > 1 else items[0]


@dataclass(frozen=True)
class PictureExamples:
    """The picture alone, for captioning a held-out set.

    Attributes:
      transform: what happens to the picture, or to each frame; frames: of a clip, 1: a picture.
    """

    transform: ImageTransform
    frames: int = 1

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where the image cannot be used."""
        image = load_image(record, self.transform, rng, self.frames)
        return {"image": image, "image_id": np.int32(record["image_id"])}


@dataclass(frozen=True)
class CaptionExamples:
    """caption_ids, caption_mask [length]: [CLS], the prompt, a caption, [SEP].

    A caption without room loses its end and has no [SEP].

    Raises:
      ValueError: the prompt leaves no room for a token of the caption.
    """

    tokenizer: Tokenizer
    transform: ImageTransform
    length: int
    prompt: str = ""
    frames: int = 1

    def __post_init__(self) -> None:
        given = len(prompt_ids(self.tokenizer, self.prompt))
        if given >= self.length:
            raise ValueError(
                f"a caption's {self.length} tokens have no room after [CLS] and the prompt "
                f"{self.prompt!r} ({given} tokens): raise config.data.target_length"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """Raises BadSample where the image or the caption drawn cannot be used."""
        index = int(rng.integers(max(len(record.get("captions") or []), 1)))
        words = caption_words(record, index, self.tokenizer)
        tokens = [*prompt_ids(self.tokenizer, self.prompt), *(t for word in words for t in word)]
        ids = [*tokens, self.tokenizer.sep_id][: self.length]
        caption_ids, caption_mask = pad(ids, self.length, self.tokenizer.pad_id)
        return {
            "image": load_image(record, self.transform, rng, self.frames),
            "image_id": np.int32(record["image_id"]),
            "caption_ids": caption_ids,
            "caption_mask": caption_mask,
        }


@dataclass(frozen=True)
class QuestionExamples:
    """A question and its answers.

    The example: text_ids, text_mask [text_length], `[CLS] question [SEP] OCR [SEP] objects [SEP]`
    where the record has such and `context` is on (official `vqa_dataset.py`); answer_ids,
    answer_mask [answers, answer_length]; answer_weights float32 [answers], the most frequent
    answers, 0 where there are fewer.
    """

    tokenizer: Tokenizer
    transform: ImageTransform
    text_length: int
    answer_length: int
    answers: int
    context: bool = True
    frames: int = 1

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where the image or the question cannot be used."""
        question = _drawn(record, "questions", rng)
        t = self.tokenizer
        words = t.words(question["question"])
        if not any(words):
            raise BadSample(f"{record['id']}: question {question['question']!r} has no words")
        context = [" ".join(question.get("ocr") or ()), question.get("objects") or ""]
        for part in map(t.words, context if self.context else ()):
            words = [*words, [t.sep_id], *part] if any(part) else words
        text_ids, text_mask = encode_words(t, words, self.text_length)
        given = sorted(question.get("answers", {}).items(), key=lambda item: -item[1])
        given = given[: self.answers]
        texts = [t.encode(answer, self.answer_length) for answer, _ in given]
        texts += [pad([t.cls_id], self.answer_length, t.pad_id)] * (self.answers - len(given))
        weights = np.zeros(self.answers, np.float32)
        weights[: len(given)] = [weight for _, weight in given]
        return {
            "image": load_image(record, self.transform, rng, self.frames),
            "image_id": np.int32(record["image_id"]),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "answer_ids": np.stack([ids for ids, _ in texts]),
            "answer_mask": np.stack([mask for _, mask in texts]),
            "answer_weights": weights,
        }


@dataclass(frozen=True)
class PhraseExamples:
    """text_ids, text_mask [text_length] of a phrase; box float32 [4], centre x, centre y, width and
    height as fractions of the picture that the transform leaves."""

    tokenizer: Tokenizer
    transform: BoxTransform
    text_length: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where the image or the phrase cannot be used."""
        phrase = _drawn(record, "phrases", rng)
        image, box, text = self._shown(record, phrase["box"], phrase["phrase"], rng)
        text_ids, text_mask = _encoded(record, text, self.tokenizer, self.text_length)
        x1, y1, x2, y2 = box
        return {
            "image": image,
            "image_id": np.int32(record["image_id"]),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "box": np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], np.float32),
        }

    def _shown(
        self, record: Record, box: Sequence[float], phrase: str, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, tuple[float, float, float, float], str]:
        """The picture, or features of it or of its mirror image, and what box and phrase become."""
        if "features" not in record:
            with naming(record):
                pixels = decode_image(record["image"])
            return self.transform(pixels, box, phrase, rng)
        features = record["features"]
        variant = 0 if rng is None else int(rng.integers(len(features)))
        if variant == 0:
            return features[0], inside(box), phrase
        return features[variant], mirrored_box(inside(box)), mirrored_phrase(phrase)


@dataclass(frozen=True)
class PairExamples:
    """NLVR2: image uint8 [2, H, W, 3], left and right; text_ids, text_mask [text_length] of the
    sentence; label int32, 1 where it is true.

    The pictures are never mirrored or swapped: sentences say left and right.
    """

    tokenizer: Tokenizer
    transform: ImageTransform
    text_length: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where an image or the sentence cannot be used."""
        pair = _field(record, "pair")
        pictures = [record, {**record, "image": pair["image2"]}]
        sentence = pair["sentence"]
        text_ids, text_mask = _encoded(record, sentence, self.tokenizer, self.text_length)
        transform = replace(self.transform, flip=False)
        return {
            "image": np.stack([load_image(each, transform, rng) for each in pictures]),
            "image_id": np.int32(record["image_id"]),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "label": np.int32(pair["label"]),
        }


@dataclass(frozen=True)
class EntailmentExamples:
    """SNLI-VE: text_ids, text_mask [text_length] of the hypothesis; label int32, its place in
    `labels`."""

    tokenizer: Tokenizer
    transform: ImageTransform
    text_length: int
    labels: Sequence[str] = ("entailment", "neutral", "contradiction")

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where the image, the hypothesis or the label cannot be used."""
        entailment = _field(record, "entailment")
        if entailment["label"] not in self.labels:
            raise BadSample(
                f"{record['id']}: label {entailment['label']!r} is none of {self.labels}"
            )
        hypothesis = entailment["hypothesis"]
        text_ids, text_mask = _encoded(record, hypothesis, self.tokenizer, self.text_length)
        return {
            "image": load_image(record, self.transform, rng),
            "image_id": np.int32(record["image_id"]),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "label": np.int32(self.labels.index(entailment["label"])),
        }
