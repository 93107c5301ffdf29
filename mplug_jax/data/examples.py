"""Records to fixed-shape examples: the last step before batching."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mplug_jax.data.clips import load_clip
from mplug_jax.data.records import BadSample, Record, naming
from mplug_jax.data.tokenizers import Tokenizer, encode_words, pad
from mplug_jax.data.transforms import ImageTransform

Example = dict[str, np.ndarray | np.generic]


def load_image(
    record: Mapping[str, Any],
    transform: ImageTransform,
    rng: np.random.Generator | None,
    frames: int = 1,
) -> np.ndarray:
    """The record's picture after `transform`, uint8 [H, W, 3] of the transform's size.

    With `frames` above 1 that many frames of its clip, [frames, H, W, 3], all cropped alike. Of a
    record with `features` a variant of them, [V, D], in place of the picture.

    Raises:
      BadSample: the image or the clip cannot be decoded, or there is no clip.
    """
    if "features" in record:
        features = record["features"]
        return features[0 if rng is None else int(rng.integers(len(features)))]
    if frames == 1 and "video" not in record:
        with naming(record):
            return transform(record["image"], rng)
    if "video" not in record:
        raise BadSample(f"{record['id']}: is a picture, and the model takes {frames} frames")
    seed = None if rng is None else int(rng.integers(2**63))
    with naming(record):
        shown = [
            transform(frame, None if seed is None else np.random.default_rng(seed))
            for frame in load_clip(record["video"], frames)
        ]
    return shown[0] if frames == 1 else np.stack(shown)


def caption_words(record: Mapping[str, Any], index: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word of a caption, words without a token dropped.

    Raises:
      BadSample: there is no such caption, or nothing of it is left after tokenisation.
    """
    captions = record.get("captions") or []
    if index >= len(captions):
        raise BadSample(f"{record['id']}: has {len(captions)} captions, asked for number {index}")
    words = [word for word in tokenizer.words(captions[index]) if word]
    if not words:
        raise BadSample(f"{record['id']}: caption {captions[index]!r} has no words")
    return words


@dataclass(frozen=True)
class PretrainExamples:
    """Makes pre-training examples: `(record, rng) -> example`.

    One caption is drawn uniformly; where it is cut into prefix and target is uniform over its
    words, the prefix holding 0 .. n-1 of them (facts of the prefix LM objective: the target has at
    least one word).

    The example: image uint8 [H, W, 3], or a variant [V, D] of the record's `features` where it has
    them; text_ids, text_mask, prefix_ids, prefix_mask [text_length]; target_ids, target_mask
    [target_length]; image_id int32.
    text is `[CLS] caption [SEP]`, prefix `[CLS] first words [SEP]`, target
    `[CLS] other words [SEP]`. A caption too long for the text is cut at a word and split within
    what is left; a target that lost its end, there or for want of room in `target_length`, has no
    [SEP], since the decoder must not learn to stop in mid-sentence.

    Attributes:
      tokenizer: see `mplug_jax.data.tokenizers`.
      transform: what happens to the picture.
      text_length: L, tokens of text and prefix with [CLS] and [SEP].
      target_length: T, tokens of the target with [CLS] and [SEP].
      empty_prefix: probability of forcing the prefix empty, so that the whole caption is target.
      frames: of a clip; 1 reads pictures.
    """

    tokenizer: Tokenizer
    transform: ImageTransform
    text_length: int
    target_length: int
    empty_prefix: float = 0.0
    frames: int = 1

    def __post_init__(self) -> None:
        if self.text_length < 3 or self.target_length < 3:
            raise ValueError(
                f"text_length ({self.text_length}) and target_length ({self.target_length}) must "
                "be at least 3: [CLS], a token, [SEP]"
            )
        if not 0.0 <= self.empty_prefix <= 1.0:
            raise ValueError(f"empty_prefix must lie in [0, 1], not {self.empty_prefix}")

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """Raises BadSample where the image or the caption drawn cannot be used."""
        index = int(rng.integers(max(len(record.get("captions") or []), 1)))
        words = caption_words(record, index, self.tokenizer)
        kept = _fitting(words, self.text_length - 2)
        split = 0 if rng.random() < self.empty_prefix else int(rng.integers(len(kept)))
        text_ids, text_mask = encode_words(self.tokenizer, kept, self.text_length)
        prefix_ids, prefix_mask = encode_words(self.tokenizer, kept[:split], self.text_length)
        target_ids, target_mask = self._target(kept[split:], complete=len(kept) == len(words))
        return {
            "image": load_image(record, self.transform, rng, self.frames),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "prefix_ids": prefix_ids,
            "prefix_mask": prefix_mask,
            "target_ids": target_ids,
            "target_mask": target_mask,
            "image_id": np.int32(record["image_id"]),
        }

    def _target(self, words: list[list[int]], complete: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens = [self.tokenizer.cls_id, *(token for word in words for token in word)]
        if complete:
            tokens.append(self.tokenizer.sep_id)
        return pad(tokens[: self.target_length], self.target_length, self.tokenizer.pad_id)


def _fitting(words: list[list[int]], room: int) -> list[list[int]]:
    """The leading words whose tokens fit into `room`; of a first word longer than that, a part."""
    kept: list[list[int]] = []
    for word in words:
        if len(word) > room:
            break
        kept.append(word)
        room -= len(word)
    return kept or [words[0][:room]]


@dataclass(frozen=True)
class EvalExamples:
    """Makes evaluation examples, without randomness: `(record, rng=None) -> example`.

    The example: image uint8 [H, W, 3]; text_ids, text_mask [text_length] of the caption number
    `caption_index`; image_id int32.
    """

    tokenizer: Tokenizer
    transform: ImageTransform
    text_length: int
    caption_index: int = 0
    frames: int = 1

    def __post_init__(self) -> None:
        if self.transform.train:
            raise ValueError("EvalExamples needs a transform with train=False")

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Raises BadSample where the image or the caption cannot be used."""
        words = caption_words(record, self.caption_index, self.tokenizer)
        text_ids, text_mask = encode_words(self.tokenizer, words, self.text_length)
        return {
            "image": load_image(record, self.transform, rng, self.frames),
            "text_ids": text_ids,
            "text_mask": text_mask,
            "image_id": np.int32(record["image_id"]),
        }
