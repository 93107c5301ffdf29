"""Agreement of boxes: the figures of the official grounding evaluation (`vgTools`)."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mplug_jax.evaluation.ids import common_ids

# A box counts as found from this IoU on, equality included.
THRESHOLD = 0.5


def box_iou(boxes: ArrayLike, others: ArrayLike) -> np.ndarray:
    """Intersection over union of boxes, pair by pair.

    Args:
      boxes, others: [..., 4] corners x1, y1, x2, y2.

    Returns:
      float [...] in 0 .. 1; 0 where both boxes have no area.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    union = _area(boxes) + _area(others) - shared
    return shared / np.where(union > 0, union, 1.0)


def corners(boxes: ArrayLike) -> np.ndarray:
    """Boxes [..., 4] of centre x, y, width, height as corners x1, y1, x2, y2."""
    boxes = np.asarray(boxes)
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def grounding_metrics(
    boxes: Mapping[Hashable, Sequence[float] | np.ndarray],
    truths: Mapping[Hashable, Sequence[float] | np.ndarray],
) -> dict[str, float]:
    """How well predicted boxes cover the true ones.

    Args:
      boxes: the predicted box of each phrase, by id: corners x1, y1, x2, y2 as fractions of the
        picture. What reaches beyond the picture is cut off first, as the official evaluation does.
      truths: the true box of each phrase, by the same ids.

    Returns:
      accuracy: percentage of phrases with an IoU of 0.5 or more (Acc@0.5); mean_iou: in percent.

    Raises:
      ValueError: a box without a phrase or the other way round, or a predicted or true box that is
        not four finite numbers; names the id.
    """
    ids = common_ids(boxes, truths, "box")
    for key in ids:
        for name, box in (("predicted", boxes[key]), ("true", truths[key])):
            if np.shape(box) != (4,) or not np.all(np.isfinite(box)):
                raise ValueError(f"the {name} box of {key!r} is {box!r}, not four finite numbers")
    predicted = np.clip(np.stack([np.asarray(boxes[key], np.float64) for key in ids]), 0.0, 1.0)
    true = np.stack([np.asarray(truths[key], np.float64) for key in ids])
    overlap = box_iou(predicted, true)
    return {
        "accuracy": 100.0 * float(np.mean(overlap >= THRESHOLD)),
        "mean_iou": 100.0 * float(np.mean(overlap)),
    }


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
