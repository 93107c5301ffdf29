"""Captioning of pictures and clips: loss, beams, self-critical training, updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug_jax.config import OFFICIAL_NO_DECAY, defaults
from mplug_jax.objectives.captioning import caption_loss
from mplug_jax.objectives.scst import beam_scores, scst_loss
from mplug_jax.training.optimizer import make_optimizer
from tests.parity.cases import SPECIAL, Case
from tests.parity.common import (
    NO_TOKEN,
    Value,
    Values,
    found_texts,
    gradients,
    mean,
    memory_of_image,
    memory_of_question,
    search,
)


def _caption_loss(case: Case, params: Any, prompt_length: int = 1) -> tuple[Any, Any]:
    ids, mask = case.text("caption")
    memory = memory_of_image(case, params, case.image)
    logits = case.apply(params, "decode", ids, *memory, mask)
    valid = jnp.ones(len(ids), bool)
    return mean(caption_loss(logits[:, :-1], ids, mask, valid, prompt_length)), logits


def caption(case: Case) -> Values:
    """Logits, loss and gradients of captioning."""
    (loss, logits), values = gradients(case, lambda p: _caption_loss(case, p), "grad/")
    values["decoder_logits"] = Value(logits)
    return values | {"loss": Value(loss), "loss_direct": Value(loss)}


def beams(case: Case) -> Values:
    """The best text of each picture, and for captions all beams."""
    of_image = case.kind == "caption"
    memory = (memory_of_image if of_image else memory_of_question)(case, case.params, case.image)
    found = search(case, memory)
    values = found_texts(case, found, "beam1", [SPECIAL["cls_id"]])
    if of_image:
        values |= found_texts(case, found, "beam_all", [SPECIAL["cls_id"]])
    return values


def scst(case: Case) -> Values:
    """The self-critical loss of the beams found, and its gradient by reading them again."""
    found = search(case, memory_of_image(case, case.params, case.image))
    values = found_texts(case, found, "scst", [SPECIAL["cls_id"]])
    ids = jnp.pad(found.ids, ((0, 0), (0, 0), (1, 0)), constant_values=SPECIAL["cls_id"])
    mask = ids != NO_TOKEN["pad_id"]
    ids = jnp.where(mask, ids, SPECIAL["pad_id"])
    valid = jnp.ones(len(ids), bool)

    def loss(params: Any) -> tuple[Any, Any]:
        memory = memory_of_image(case, params, case.image)
        logits = case.apply(params, "decode", ids.reshape(-1, ids.shape[-1]), *memory)
        logits = logits.reshape(*ids.shape, -1)[:, :, :-1]
        total = scst_loss(logits, ids, mask, case.inputs["scst_reward"], valid)
        return mean(total), beam_scores(logits, ids, mask)

    (total, scores), named = gradients(case, loss, "scst/grad/")
    np.testing.assert_allclose(scores, found.scores, atol=1e-4)
    return values | named | {"scst/loss": Value(total), "scst/lengths": Value(mask.sum(-1))}


def adamw(case: Case) -> Values:
    """Losses before each update and after the last, with the official groups of parameters."""
    s = case.settings["adamw"]
    config = {
        **defaults("tiny").optimizer.to_dict(),
        "lr": s["lr1"],
        "weight_decay": s["weight_decay"],
        "clip_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "rules": (OFFICIAL_NO_DECAY, ("^visual_encoder/", {"lr": s["lr2"]})),
    }
    losses = sum(name.startswith("adamw/loss_step") for name in case.outputs)
    optimizer = make_optimizer(case.params, config, losses - 1)

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: _caption_loss(case, p)[0])(params)
        updates, state = optimizer.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    params, state, values = case.params, optimizer.init(case.params), {}
    for step in range(losses):
        loss, updated, state = update(params, state)
        values[f"adamw/loss_step{step}"] = Value(loss)
        params = updated if step + 1 < losses else params
    named = case.official_names(params)
    return values | {f"adamw/param/{name}": Value(value) for name, value in named.items()}


def video_caption(case: Case) -> Values:
    """Captions of clips: the decoder reads the tokens of all frames after a prompt."""
    prompt = case.settings["prompt_ids"]
    frames = case.image.reshape(-1, *case.image.shape[2:])

    def memory_of(params: Any) -> Any:
        embeds = case.apply(params, "encode_image", frames)
        embeds = embeds.reshape(len(case.image), -1, embeds.shape[-1])
        return embeds, jnp.ones(embeds.shape[:2], bool)

    def loss(params: Any) -> tuple[Any, None]:
        ids, mask = case.text("caption")
        logits = case.apply(params, "decode", ids[:, :-1], *memory_of(params))
        valid = jnp.ones(len(ids), bool)
        return mean(caption_loss(logits, ids, mask, valid, len(prompt) - 1)), None

    (total, _), values = gradients(case, loss, "grad/")
    # Official mistake: the search starts without the prompt's last word.
    prompt = prompt[:-1]
    found = search(case, memory_of(case.params), jnp.array(prompt))
    return values | found_texts(case, found, "beam1", prompt) | {"loss": Value(total)}
