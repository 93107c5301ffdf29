"""Captioning by cross-entropy (official ``models/model_caption_mplug.py``)."""

from __future__ import annotations

from typing import Any

from mplug_jax.data.task_examples import CaptionExamples, prompt_ids
from mplug_jax.objectives.captioning import caption_loss
from mplug_jax.tasks.forward import Forward, picture_memory
from mplug_jax.tasks.kind import Kind, LossParts
from mplug_jax.tasks.setup import Setup


def examples(setup: Setup) -> CaptionExamples:
    """Pictures with a caption after the prompt."""
    config = setup.config
    return CaptionExamples(
        setup.tokenizer,
        setup.transform,
        config.data.target_length,
        config.finetune.caption.prompt,
        setup.model_config.frames,
    )


def loss(setup: Setup, forward: Forward, teacher: Any, batch: Any, step: Any) -> LossParts:
    """Next-token loss of what follows the prompt."""
    settings, tokenizer = setup.config.finetune.caption, setup.tokenizer
    memory = picture_memory(
        forward, batch["image"], settings.memory, tokenizer.cls_id, tokenizer.sep_id
    )
    ids, mask = batch["caption_ids"], batch["caption_mask"]
    logits = forward("decode", ids[:, :-1], *memory)
    prompt = len(prompt_ids(tokenizer, settings.prompt))
    return *caption_loss(logits, ids, mask, batch["valid"], prompt), {}


CAPTION = Kind(examples, loss)
