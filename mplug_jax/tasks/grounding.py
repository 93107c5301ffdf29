"""Visual grounding: a phrase's box as four tokens (official ``model_visual_grounding_mplug``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.task_examples import PhraseExamples
from mplug_jax.objectives.grounding import (
    OFFICIAL_COORDINATES,
    CoordinateTokens,
    box_ids,
    giou,
    grounding_loss,
    predicted_boxes,
    to_corners,
)
from mplug_jax.tasks.forward import Forward, text_memory
from mplug_jax.tasks.kind import Kind, LossParts
from mplug_jax.tasks.setup import Setup


def coordinate_tokens(setup: Setup) -> CoordinateTokens:
    """The coordinate tokens of a config: appended to the tokenizer's, or BERT's unused ones."""
    settings, size = setup.config.finetune.grounding, setup.tokenizer.vocab_size
    if settings.appended:
        return CoordinateTokens(first=size + 1, bins=settings.bins, prefix=size)
    official = OFFICIAL_COORDINATES
    return CoordinateTokens(official.first, settings.bins, official.prefix)


def coordinate_mask(setup: Setup) -> np.ndarray:
    """bool ``[vocab]``, True on the coordinate tokens, which are all that a box may be written in.

    Raises:
      ValueError: the vocabulary ends before they do.
    """
    tokens, size = coordinate_tokens(setup), setup.model_config.text.vocab_size
    if tokens.first + tokens.bins > size:
        raise ValueError(
            f"config.finetune.grounding.bins={tokens.bins} end at token "
            f"{tokens.first + tokens.bins - 1}, but the vocabulary has {size}: set "
            "config.finetune.grounding.appended=True, or take fewer bins."
        )
    ids = np.arange(size)
    return (ids >= tokens.first) & (ids < tokens.first + tokens.bins)


def examples(setup: Setup) -> PhraseExamples:
    """Phrases with their boxes."""
    data, size = setup.config.data, setup.model_config.vision.image_size
    crop = None if data.crop_scale is None else tuple(data.crop_scale)
    transform = BoxTransform(size, train=True, crop_scale=crop, flip=data.flip)
    return PhraseExamples(setup.tokenizer, transform, data.text_length)


def loss(setup: Setup, forward: Forward, teacher: Any, batch: Any, step: Any) -> LossParts:
    """Cross-entropy of the coordinate tokens, by default weighted by how far off the box is."""
    tokens = coordinate_tokens(setup)
    memory = text_memory(forward, batch["image"], batch["text_ids"], batch["text_mask"])
    logits = forward("decode", box_ids(batch["box"], tokens)[:, :-1], *memory)
    weighting = setup.config.finetune.grounding.weighting
    parts = grounding_loss(logits, batch["box"], batch["valid"], tokens, weighting)
    overlap = giou(to_corners(predicted_boxes(logits, tokens)), to_corners(batch["box"]))
    rows = jnp.maximum(batch["valid"].sum(), 1)
    shown = jax.lax.stop_gradient(jnp.where(batch["valid"], overlap, 0.0).sum() / rows)
    return *parts, {"giou": shown}


GROUNDING = Kind(examples, loss)
