"""VQA: answer losses, ranking, and the momentum model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.generation.ranking import rank_answers
from mplug_jax.objectives.momentum import ema
from mplug_jax.objectives.vqa import answer_losses, vqa_loss
from mplug_jax.training.step import keep_frozen
from tests.parity.cases import Case, channels_last
from tests.parity.common import (
    MOMENTUM,
    OFFICIAL_TEACHER_FROZEN,
    Value,
    Values,
    gradients,
    mean,
    memory_of_question,
    teacher_values,
)


def _answers(case: Case) -> tuple[Any, Any, Any, Any]:
    """Answers by question: ids and masks ``[B, K, T]``, weights ``[B, K]``, row of each answer."""
    ids, mask = case.text("answer")
    counts = case.inputs["k"]
    question = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(k) for k in counts])

    def spread(flat: Any) -> jax.Array:
        shape = (len(counts), counts.max(), *flat.shape[1:])
        return jnp.zeros(shape, flat.dtype).at[question, place].set(flat)

    return spread(ids), spread(mask), spread(case.inputs["weights"]), (question, place)


def vqa(case: Case) -> Values:
    """Weighted answer losses, their gradient, and answers ranked for pictures and for clips."""
    ids, mask, weights, rows = _answers(case)
    valid = jnp.ones(len(ids), bool)

    def loss(params: Any) -> tuple[Any, Any]:
        logits = _answer_logits(case, params, ids, mask)
        total = vqa_loss(logits[:, :, :-1], ids, mask, weights, valid)
        return mean(total), (logits[rows], answer_losses(logits[:, :, :-1], ids, mask)[rows])

    (total, (logits, each)), values = gradients(case, loss, "grad/")
    values |= {
        "decoder_logits": Value(logits),
        "loss_per_answer": Value(each),
        "loss": Value(total),
        "loss_alpha0.0": Value(total),
        # Official mistake: alpha is never passed on, so it changes nothing.
        "loss_alpha0.4": Value(total),
    }
    for name, image in (("rank", case.image), ("video_rank", channels_last(case.inputs["video"]))):
        order, probabilities = _ranking(case, image)
        values |= {
            f"{name}/topk_ids": Value(order),
            f"{name}/topk_probs": Value(probabilities),
        }
    return values


def _answer_logits(case: Case, params: Any, ids: Any, mask: Any) -> Any:
    memory = memory_of_question(case, params, case.image)
    flat_ids, flat_mask = (x.reshape(-1, x.shape[-1]) for x in (ids, mask))
    logits = case.apply(params, "decode", flat_ids, *memory, flat_mask)
    return logits.reshape(*ids.shape, -1)


def _ranking(case: Case, image: Any) -> Any:
    answers, k = case.text("answer_list"), int(case.inputs["k_test"])

    def rank(params: Any) -> Any:
        if image.ndim == 5:  # a clip's frames count as one long picture
            embeds = case.apply(params, "encode_image", image.reshape(-1, *image.shape[2:]))
            embeds = embeds.reshape(len(image), -1, embeds.shape[-1])
        else:
            embeds = case.apply(params, "encode_image", image)
        ids, mask = case.text("question")
        text = case.apply(params, "encode_text", ids, mask)
        memory = case.apply(params, "memory", *case.apply(params, "fuse", embeds, text, mask), mask)
        return rank_answers(case.model, params, *memory, *answers, k=k, score="official")

    return jax.jit(rank)(case.params)


def vqa_momentum(case: Case) -> Values:
    """The momentum model after one step, and the distillation that is never used."""
    if not case.settings["distill"]:
        return {}
    ids, mask, _, rows = _answers(case)
    teacher = ema(case.imported("_m"), case.params, MOMENTUM)
    # Official mistake: the teacher's fusion network is in no list of pairs to average.
    teacher = keep_frozen(case.imported("_m"), teacher, OFFICIAL_TEACHER_FROZEN)
    logits = jax.jit(lambda p: _answer_logits(case, p, ids, mask))
    online, taught = logits(case.params)[:, :, :-1], logits(teacher)[:, :, :-1]
    each = answer_losses(online, ids, mask, taught, 0.4, softmax_axis="sequence")[rows]
    values = {
        "momentum/logits_m": Value(taught[rows]),
        "momentum/loss_per_answer_if_alpha_0.4_were_passed": Value(each),
    }
    return values | teacher_values(case, teacher, "momentum_after/")
