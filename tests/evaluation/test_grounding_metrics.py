"""IoU and Acc@0.5 by hand and against numbers of the official PyTorch code."""

import numpy as np
import pytest

from mplug_jax.evaluation.grounding import box_iou, corners, grounding_metrics

# Boxes as centre, width, height, and what the official `bbox_iou` says.
TRUE = [
    [0.64566875, 0.5886394, 0.13685426, 0.5555152],
    [0.69633865, 0.60755515, 0.24933076, 0.18704793],
    [0.47799656, 0.595688, 0.29021546, 0.19484133],
]
NEAR = np.add(TRUE, 0.05)
NEAR_IOU = [0.45707154, 0.4474672, 0.4751524]
GENERATED = [
    [0.3392857, 0.3392857, 0.3392857, 0.3392857],
    [0.5119048, 0.3392857, 0.36309522, 0.7589286],
    [0.9077381, 0.13095239, 0.9047619, 0.36309522],
]
GENERATED_IOU = [0.0, 0.07997154, 0.0]


def test_official_numbers():
    np.testing.assert_allclose(box_iou(corners(TRUE), corners(NEAR)), NEAR_IOU, atol=1e-6)
    predicted, true = dict(enumerate(corners(GENERATED))), dict(enumerate(corners(TRUE)))
    metrics = grounding_metrics(predicted, true)
    assert metrics["mean_iou"] == pytest.approx(100 * np.mean(GENERATED_IOU), abs=1e-5)
    assert metrics["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 0.5, 0.5], 1.0),
        ([0.25, 0.0, 0.75, 0.5], 1 / 3),
        ([0.1, 0.1, 0.2, 0.2], 0.04),  # inside
        ([0.5, 0.0, 1.0, 0.5], 0.0),  # side by side
        ([0.6, 0.6, 0.9, 0.9], 0.0),  # apart in both directions
        ([0.3, 0.3, 0.3, 0.3], 0.0),  # no area
    ],
)
def test_iou_by_hand(other, expected):
    box = np.array([0.0, 0.0, 0.5, 0.5])
    assert box_iou(box, other) == pytest.approx(expected)
    assert box_iou(other, box) == pytest.approx(expected)


def test_two_empty_boxes_share_nothing():
    assert box_iou([0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3]) == 0.0


def test_half_counts_as_found_and_order_does_not_matter():
    true = {"half": [0, 0, 1, 1], "less": [0, 0, 1, 1], "same": [0.2, 0.2, 0.4, 0.6]}
    boxes = {"same": [0.2, 0.2, 0.4, 0.6], "less": [0, 0, 0.49, 1], "half": [0, 0, 0.5, 1]}
    assert grounding_metrics(boxes, true) == pytest.approx(
        {"accuracy": 200 / 3, "mean_iou": 100 * (0.5 + 0.49 + 1) / 3}
    )


def test_what_reaches_beyond_the_picture_is_cut():
    boxes = {1: [-0.5, -0.5, 0.5, 0.5]}
    assert grounding_metrics(boxes, {1: [0, 0, 0.5, 0.5]})["mean_iou"] == pytest.approx(100.0)


def test_corners_keep_leading_axes():
    np.testing.assert_allclose(corners([[[0.5, 0.4, 0.2, 0.6]]]), [[[0.4, 0.1, 0.6, 0.7]]])


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, 1, np.nan], [[0, 0, 1, 1]]])
def test_what_is_no_box_raises(box):
    good = [0, 0, 1, 1]
    with pytest.raises(ValueError, match="the predicted box of 'p' is"):
        grounding_metrics({"p": box}, {"p": good})
    with pytest.raises(ValueError, match="the true box of 'p' is"):
        grounding_metrics({"p": good}, {"p": box})
    with pytest.raises(ValueError, match=r"1 box \('p'\) missing"):
        grounding_metrics({}, {"p": good})
