"""Coordinate tokens, GIoU and the grounding loss against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.grounding import (
    OFFICIAL_COORDINATES,
    WEIGHTINGS,
    CoordinateTokens,
    bins_to_boxes,
    box_ids,
    boxes_to_bins,
    coordinate_logits,
    giou,
    grounding_loss,
    predicted_boxes,
    to_corners,
)

B, V = 5, 30
COORDINATES = CoordinateTokens(first=7, bins=17, prefix=3)
VALID = np.array([True, True, False, True, False])
EPS = 1e-5

run = jax.jit(jax.value_and_grad(grounding_loss, has_aux=True), static_argnums=(3, 4))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(B, 4, V))).astype(np.float32)
    logits[..., 25:] += 9  # not a coordinate, however likely
    boxes = rng.uniform(0.15, 0.6, (B, 4)).astype(np.float32)
    return logits, boxes, VALID


def corners(box):
    cx, cy, w, h = np.float64(box)
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def reference_giou(a, b, eps=EPS):
    """Of two boxes by corners."""
    inner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    outer = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union = area(a) + area(b) - area(inner)
    return area(inner) / (union + eps) - (area(outer) - union) / (area(outer) + eps)


def reference(logits, boxes, valid, weighting):
    """(weights, cross-entropies) [B, 4] and the sum over the valid rows."""
    weights, losses = np.zeros((B, 4)), np.zeros((B, 4))
    for b in np.flatnonzero(valid):
        bins = np.float64(logits[b, :, 7:24])
        odds = np.exp(bins)
        target = [int(np.clip(x, 0, 1) * 16) for x in boxes[b]]
        guess = bins.argmax(axis=1) / 16
        losses[b] = [-np.log(odds[i, target[i]] / odds[i].sum()) for i in range(4)]
        far = 1 - reference_giou(corners(guess), corners(boxes[b]))
        weights[b] = 1 if weighting == "none" else np.minimum(np.abs(guess - boxes[b]), 5) * far
    if weighting == "official":
        losses = np.where(valid[:, None], losses.sum(axis=0) / valid.sum(), 0)
    return weights, losses, (weights * losses).sum()


def test_official_bins_are_pixels_at_336():
    boxes = np.array([[0.0, 1.0, 0.5, 1 / 336], [-0.2, 1.3, 0.00297, 0.99999]], np.float32)
    want = [[344, 345, 681, 513, 346], [344, 345, 681, 345, 680]]
    ids = box_ids(boxes, OFFICIAL_COORDINATES)
    np.testing.assert_array_equal(ids, want)
    assert ids.dtype == jnp.int32


def test_a_bin_and_its_value_agree():
    bins = np.arange(17)
    values = bins_to_boxes(bins, COORDINATES)
    np.testing.assert_allclose(values, bins / 16)
    np.testing.assert_array_equal(boxes_to_bins(values, COORDINATES), bins)
    np.testing.assert_array_equal(boxes_to_bins(values + 0.6 / 16, COORDINATES), bins)


def test_only_bins_are_predicted(batch):
    logits, *_ = batch
    lowered = jax.jit(coordinate_logits, static_argnums=1)(logits, COORDINATES)
    np.testing.assert_array_equal(lowered[..., 7:24], logits[..., 7:24])
    outside = np.r_[0:7, 24:V]
    np.testing.assert_allclose(lowered[..., outside], logits[..., outside] - 1e4, rtol=1e-6)
    got = jax.jit(predicted_boxes, static_argnums=1)(logits, COORDINATES)
    np.testing.assert_allclose(got, logits[..., 7:24].argmax(axis=-1) / 16)


def test_a_vocabulary_without_room_for_the_bins_is_refused():
    with pytest.raises(ValueError, match="do not fit a vocabulary of 23"):
        coordinate_logits(jnp.zeros((1, 4, 23)), COORDINATES)


def test_one_bin_is_refused():
    with pytest.raises(ValueError, match="2 bins or more"):
        CoordinateTokens(first=7, bins=1, prefix=3)


@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_giou_broadcasts_over_pairs(eps):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 0.9, (2, 6, 4)).astype(np.float32)
    b[0] = a[0]  # the same box, and one inside another
    b[1, :2], b[1, 2:] = a[1, :2], a[1, 2:] / 2
    got = jax.jit(lambda a, b: giou(to_corners(a)[:, None], to_corners(b), eps))(a, b)
    want = [[reference_giou(corners(x), corners(y), eps) for y in b] for x in a]
    np.testing.assert_allclose(got, want, atol=2e-6)
    if eps == 0:
        np.testing.assert_allclose(got[0, 0], 1, rtol=1e-6)
        assert np.min(got) < 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("valid", [np.ones(B, bool), VALID], ids=["all", "some"])
def test_loss_and_gradient(batch, weighting, valid):
    logits, boxes, _ = batch
    (loss_sum, count), grad = run(logits, boxes, valid, COORDINATES, weighting)
    weights, _, want = reference(logits, boxes, valid, weighting)
    np.testing.assert_allclose(loss_sum, want, rtol=1e-5)
    assert count == 4 * valid.sum()
    assert loss_sum.dtype == count.dtype == jnp.float32
    # The weights are constants: the gradient is theirs times that of the cross-entropy.
    if weighting == "official":
        weights = np.where(valid[:, None], weights.sum(axis=0) / valid.sum(), 0)
    odds = np.exp(np.float64(logits[..., 7:24]))
    bins = np.floor(boxes * 16).astype(int)
    slope = odds / odds.sum(axis=-1, keepdims=True) - np.eye(17)[bins]
    np.testing.assert_allclose(grad[..., 7:24], weights[..., None] * slope, atol=1e-5)
    assert not np.any(grad[..., :7]) and not np.any(grad[..., 24:])


def test_the_weightings_differ(batch):
    assert len({float(run(*batch, COORDINATES, w)[0][0]) for w in WEIGHTINGS}) == len(WEIGHTINGS)


def test_an_unknown_weighting_is_refused(batch):
    with pytest.raises(ValueError, match="'mine' is unknown"):
        grounding_loss(*batch, COORDINATES, "mine")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_invalid_rows_change_nothing(batch, weighting):
    logits, boxes, valid = batch
    dirty_logits = np.where(valid[:, None, None], logits, np.nan)
    dirty_boxes = np.where(valid[:, None], boxes, np.nan)
    clean = run(logits, boxes, valid, COORDINATES, weighting)
    dirty = run(dirty_logits, dirty_boxes, valid, COORDINATES, weighting)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not np.any(clean[1][~valid])


def test_bfloat16_logits_are_computed_in_float32(batch):
    logits, boxes, valid = batch
    low = jnp.asarray(logits, jnp.bfloat16)
    got, _ = run(low, boxes, valid, COORDINATES, "own")
    want = reference(np.float64(low), boxes, valid, "own")[2]
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    assert got[0].dtype == jnp.float32


def test_no_valid_row_is_zero_and_finite(batch):
    logits, boxes, _ = batch
    (loss_sum, count), grad = run(logits, boxes, np.zeros(B, bool), COORDINATES, "own")
    assert loss_sum == 0 and count == 0
    assert not np.any(grad)


def test_a_box_without_area_stays_finite():
    """Every coordinate predicted as bin 0, and a true box that is a point."""
    logits = np.zeros((1, 4, V), np.float32)
    logits[..., 7] = 5
    (loss_sum, _), grad = run(logits, np.zeros((1, 4)), np.ones(1, bool), COORDINATES, "own")
    assert loss_sum == 0 and not np.any(grad)
    (loss_sum, _), grad = run(logits, np.full((1, 4), 0.5), np.ones(1, bool), COORDINATES, "own")
    assert np.isfinite(loss_sum) and loss_sum > 0 and np.all(np.isfinite(grad))
