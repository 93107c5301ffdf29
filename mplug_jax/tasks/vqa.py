"""Visual question answering, of pictures and of clips (official ``models/model_vqa_mplug.py``)."""

from __future__ import annotations

from typing import Any

import jax

from mplug_jax.data.task_examples import QuestionExamples
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.objectives.momentum import alpha_ramp
from mplug_jax.objectives.vqa import vqa_loss
from mplug_jax.tasks.forward import Forward, answer_logits, text_memory
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


def loss(
    setup: Setup, forward: Forward, teacher: Forward | None, batch: Any, step: Any
) -> LossParts:
    """Every answer's loss by its weight, distilled from the teacher where there is one."""
    objectives, alpha, taught = setup.config.objectives, 0.0, None

    def read(model: Forward) -> jax.Array:
        memory = text_memory(model, batch["image"], batch["text_ids"], batch["text_mask"])
        return answer_logits(model, memory, batch["answer_ids"])

    if teacher is not None:
        alpha = alpha_ramp(step, setup.config.finetune.vqa.alpha, objectives.alpha_ramp_steps)
        taught = jax.lax.stop_gradient(read(teacher))
    parts = vqa_loss(
        read(forward),
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
