"""Visual grounding: the weighted loss, its parts, and greedy boxes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.evaluation.grounding import box_iou, corners, grounding_metrics
from mplug_jax.generation.greedy import greedy
from mplug_jax.objectives.grounding import (
    OFFICIAL_COORDINATES,
    bins_to_boxes,
    box_ids,
    coordinate_logits,
    giou,
    grounding_loss,
    predicted_boxes,
    to_corners,
)
from tests.parity.cases import SPECIAL, Case
from tests.parity.common import Value, Values, gradients, mean, memory_of_question


def grounding(case: Case) -> Values:
    """The weighted loss of the coordinate tokens, its parts, and the greedy box."""
    boxes = jnp.asarray(case.inputs["target_box_cxcywh"])
    other = jnp.asarray(case.inputs["box2"])
    tokens, valid = box_ids(boxes, OFFICIAL_COORDINATES), jnp.ones(len(boxes), bool)

    def loss(params: Any) -> tuple[Any, Any]:
        memory = memory_of_question(case, params, case.image)
        logits = case.apply(params, "decode", tokens, *memory)
        total = grounding_loss(
            logits[:, :-1], boxes, valid, OFFICIAL_COORDINATES, weighting="official"
        )
        return mean(total), coordinate_logits(logits, OFFICIAL_COORDINATES)

    (total, logits), values = gradients(case, loss, "grad/")
    predicted = predicted_boxes(logits[:, :-1], OFFICIAL_COORDINATES)
    drawn = _drawn_boxes(case)
    found = dict(enumerate(corners(drawn)))
    scores = grounding_metrics(found, dict(enumerate(corners(boxes))))
    inside = np.clip(corners(drawn), 0.0, 1.0)  # as the official evaluation cuts them
    return values | {
        "loss_seq": Value(total),
        "loss": Value(total),
        # Outside the bins -1e4 was added: float32 steps are ten times the tolerance there.
        "logits": Value(logits, np.broadcast_to(_inside(case), logits.shape)),
        "target_ids": Value(tokens[:, 1:]),
        "train_pred_box": Value(predicted),
        "weight_bbox": Value(jnp.abs(predicted - boxes)),
        "weight_giou": Value(1 - giou(to_corners(predicted), to_corners(boxes))),
        "box/giou_matrix": Value(giou(to_corners(boxes)[:, None], to_corners(other)[None])),
        "box/iou": Value(box_iou(corners(boxes), corners(other))),
        "pred_box": Value(drawn),
        "pred_iou": Value(box_iou(inside, corners(boxes))),
        "pred_acc": Value(scores["accuracy"] / 100),
    }


def _drawn_boxes(case: Case) -> Any:
    """Four greedy tokens within the bins."""
    c, allowed = OFFICIAL_COORDINATES, jnp.asarray(_inside(case))

    def draw(params: Any) -> Any:
        return greedy(
            case.model,
            params,
            *memory_of_question(case, params, case.image),
            max_length=4,
            prompt_ids=jnp.array([c.prefix]),
            allowed=allowed,
            **SPECIAL,
        )

    return bins_to_boxes(jax.jit(draw)(case.params) - c.first, c)


def _inside(case: Case) -> np.ndarray:
    """Which tokens of the vocabulary are bins."""
    c, ids = OFFICIAL_COORDINATES, np.arange(case.config.text.vocab_size)
    return (ids >= c.first) & (ids < c.first + c.bins)
