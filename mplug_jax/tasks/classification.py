"""NLVR2 and visual entailment: a class decided from the fused text.

The official code has only the data readers of both. Entailment classifies the fused first token;
NLVR2 fuses the sentence with each picture by itself, as pre-training did, and classifies the two
first tokens together (the "pair" set-up of Chen et al. 2020, "UNITER").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.task_examples import EntailmentExamples, PairExamples
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.objectives.classification import classification_hits, classification_loss
from mplug_jax.tasks.forward import Forward
from mplug_jax.tasks.kind import Kind, LossParts
from mplug_jax.tasks.setup import Setup


def class_examples(setup: Setup, transform: ImageTransform) -> Any:
    """Examples of ``config.task``, as training and evaluation read them."""
    maker = {"nlvr2": PairExamples, "snli_ve": EntailmentExamples}[setup.config.task]
    return maker(setup.tokenizer, transform, setup.config.data.text_length)


def examples(setup: Setup) -> Any:
    """Training examples with their labels."""
    return class_examples(setup, setup.transform)


def class_logits(forward: Forward, batch: Any) -> jax.Array:
    """``[B, classes]`` for pictures ``[B, H, W, 3]`` or ``[B, P, H, W, 3]``, P of them a text."""
    image, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"]
    pictures = image.shape[1] if image.ndim == 5 else 1
    embeds = forward("encode_image", image.reshape(-1, *image.shape[-3:]))
    rows = np.arange(len(ids)).repeat(pictures)
    texts = forward("encode_text", ids, mask)[rows]
    fused = forward("fuse_text", embeds, texts, mask[rows])
    return forward("classify", fused)


def loss(setup: Setup, forward: Forward, teacher: Any, batch: Any, step: Any) -> LossParts:
    """Cross-entropy over the classes; ``accuracy`` of the batch is logged."""
    logits = class_logits(forward, batch)
    parts = classification_loss(logits, batch["label"], batch["valid"])
    hits, count = classification_hits(logits, batch["label"], batch["valid"])
    return *parts, {"accuracy": hits / jnp.maximum(count, 1.0)}


CLASSIFICATION = Kind(examples, loss)
