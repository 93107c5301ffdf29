"""Visual question answering, of pictures and of clips (official ``models/model_vqa_mplug.py``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax.data.task_examples import QuestionExamples
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.objectives.momentum import alpha_ramp
from mplug_jax.objectives.vqa import vqa_loss
from mplug_jax.tasks.forward import Forward, text_memory
from mplug_jax.tasks.kind import Kind, LossParts
from mplug_jax.tasks.setup import Setup


def question_examples(setup: Setup, transform: ImageTransform) -> QuestionExamples:
    """Questions as training and evaluation read them."""
    config = setup.config
    return QuestionExamples(
        setup.tokenizer,
        transform,
        config.data.text_length,
        config.data.target_length,
        config.finetune.vqa.answers,
        config.finetune.vqa.context,
        setup.model_config.frames,
    )


def examples(setup: Setup) -> QuestionExamples:
    """Training questions with their answers."""
    return question_examples(setup, setup.transform)


def _answer_logits(forward: Forward, batch: Any) -> jax.Array:
    """``[B, K, T-1, vocab]``: every answer of a question reads the same memory."""
    memory = text_memory(forward, batch["image"], batch["text_ids"], batch["text_mask"])
    ids = batch["answer_ids"]
    memory, mask = (jnp.repeat(x, ids.shape[1], axis=0) for x in memory)
    logits = forward("decode", ids.reshape(-1, ids.shape[-1])[:, :-1], memory, mask)
    return logits.reshape(*ids.shape[:2], *logits.shape[1:])


def loss(
    setup: Setup, forward: Forward, teacher: Forward | None, batch: Any, step: Any
) -> LossParts:
    """Every answer's loss by its weight, distilled from the teacher where there is one."""
    objectives, alpha, taught = setup.config.objectives, 0.0, None
    if teacher is not None:
        alpha = alpha_ramp(step, setup.config.finetune.vqa.alpha, objectives.alpha_ramp_steps)
        taught = jax.lax.stop_gradient(_answer_logits(teacher, batch))
    parts = vqa_loss(
        _answer_logits(forward, batch),
        batch["answer_ids"],
        batch["answer_mask"],
        batch["answer_weights"],
        batch["valid"],
        taught,
        alpha,
        "sequence" if objectives.official_sequence_softmax else "vocabulary",
    )
    return *parts, {}


VQA = Kind(examples, loss, teaches=True)
