"""Retrieval: ITC, ITM, the queue and the momentum model, two-stage evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.evaluation.retrieval import retrieval_metrics, scatter_scores, top_k_indices
from mplug_jax.objectives.itc import ITCQueue, enqueue, itc_loss
from mplug_jax.objectives.itm import itm_labels, itm_loss, negative_weights
from mplug_jax.objectives.momentum import ema
from mplug_jax.training.step import keep_frozen
from tests.parity.cases import SPECIAL, Case, channels_last, ids_of
from tests.parity.common import (
    MOMENTUM,
    OFFICIAL_TEACHER_FROZEN,
    Value,
    Values,
    gradients,
    mean,
    teacher_values,
)


def retrieval(case: Case) -> Values:
    """ITC and ITM for each alpha, the queue and momentum model after it, two-stage evaluation."""
    old = case.imported("_m")
    teacher = keep_frozen(old, ema(old, case.params, MOMENTUM), OFFICIAL_TEACHER_FROZEN)
    ids, mask = case.text("text")
    w, image_ids = case.weights, ids_of(case.inputs["idx"])
    valid = jnp.ones(len(image_ids), bool)
    queue = ITCQueue(
        image=jnp.asarray(w["image_queue"].T),
        text=jnp.asarray(w["text_queue"].T),
        ids=ids_of(w["idx_queue"][0]),
        pointer=ids_of(w["queue_ptr"][0]),
    )

    def features(params: Any) -> tuple[Any, Any, Any, Any]:
        image = case.apply(params, "encode_image", case.image)
        text = case.apply(params, "encode_text", ids, mask)
        projected = [
            case.apply(params, f"project_{name}", x)
            for name, x in (("image", image), ("text", text))
        ]
        return image, text, *projected

    _, _, image_m, text_m = jax.jit(features)(teacher)
    values: Values = {}
    for alpha in (0.0, 0.4):
        loss = functools.partial(
            _retrieval_loss, case, features, (image_m, text_m), queue, alpha, image_ids, valid
        )
        (_, found), named = gradients(case, loss, f"alpha{alpha}/grad/")
        values |= named | {f"alpha{alpha}/{n}": Value(v) for n, v in found.items()}
    after = enqueue(queue, image_m, text_m, image_ids, valid)
    values |= {
        "after/image_queue": Value(after.image.T),
        "after/text_queue": Value(after.text.T),
        "after/idx_queue": Value(after.ids[None]),
        "after/queue_ptr": Value(after.pointer[None]),
    }
    return values | teacher_values(case, teacher, "after/") | _two_stage(case)


def _retrieval_loss(
    case: Case,
    features: Callable[[Any], Any],
    taught: tuple[Any, Any],
    queue: ITCQueue,
    alpha: float,
    image_ids: Any,
    valid: Any,
    params: Any,
) -> tuple[Any, dict[str, Any]]:
    image, text, image_feats, text_feats = features(params)
    _, mask = case.text("text")
    temperature = case.apply(params, "temperature")
    itc = itc_loss(image_feats, text_feats, *taught, queue, image_ids, valid, temperature, alpha)
    # The case replaced the official draw by the likeliest negative.
    to_text = negative_weights(itc.image_to_text, image_ids, valid)
    to_image = negative_weights(itc.text_to_image, image_ids, valid)
    texts, images = to_text.argmax(1), to_image.argmax(1)
    own = jnp.arange(len(image_ids))
    rows = jnp.concatenate([own, own, texts])
    _, fused = case.apply(
        params, "fuse", image, text[rows], mask[rows], jnp.concatenate([own, images, own])
    )
    logits = case.apply(params, "match", fused)
    itm = mean(itm_loss(logits, itm_labels(len(own)), jnp.ones(len(rows), bool)))
    banks = [
        jnp.concatenate([f, q]) for f, q in zip(taught, (queue.image, queue.text), strict=True)
    ]
    found = {
        "loss_ita": mean((itc.loss_sum, itc.count)),
        "loss_itm": itm,
        "itm_logits": logits,
        "sim_i2t": image_feats @ banks[1].T / temperature,
        "sim_t2i": text_feats @ banks[0].T / temperature,
        "neg_text_for_image": texts,
        "neg_image_for_text": images,
        "weights_i2t": to_text,
        "weights_t2i": to_image,
    }
    return found["loss_ita"] + itm, found


def _two_stage(case: Case) -> Values:
    """Scores of the best candidates by ITC, re-ranked by the match logit; the rest -100."""
    images = channels_last(case.inputs["eval/image"])
    ids = ids_of(case.inputs["eval/text_ids"])
    mask, k = ids != SPECIAL["pad_id"], case.settings["k_test"]

    def score(params: Any) -> Any:
        image = case.apply(params, "encode_image", images)
        text = case.apply(params, "encode_text", ids, mask)
        pairs = np.indices((len(images), len(ids))).reshape(2, -1)
        _, fused = case.apply(params, "fuse", image, text[pairs[1]], mask[pairs[1]], pairs[0])
        match = case.apply(params, "match", fused)[:, 1].reshape(len(images), len(ids))
        feats = case.apply(params, "project_image", image), case.apply(params, "project_text", text)
        return feats[0] @ feats[1].T, match

    similarity, match = (np.asarray(x) for x in jax.jit(score)(case.params))
    values, scores = {}, []
    for name, sims, logits in (("i2t", similarity, match), ("t2i", similarity.T, match.T)):
        best = top_k_indices(sims, k)
        chosen = np.take_along_axis(logits, best, axis=1)
        scores.append(scatter_scores(sims.shape, best, chosen))
        values[f"eval/score_{name}"] = Value(scores[-1])
    own = np.arange(len(images))
    metrics = retrieval_metrics(*scores, own, np.repeat(own, case.settings["txt_per_img"]))
    told = {n: v for n, v in metrics.items() if n.endswith("_r1") or k >= max(sims.shape)}
    return values | {f"metric/{n}": Value(v) for n, v in told.items()}
