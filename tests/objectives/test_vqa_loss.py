"""VQA loss against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.vqa import answer_losses, vqa_loss

B, K, T, V = 3, 4, 5, 9
VALID = np.array([True, False, True])
WEIGHTS = np.array([[0.6, 1.0, 0.0, 0.3], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], np.float32)
HERE = (WEIGHTS > 0) & VALID[:, None]
AXES = ("vocabulary", "sequence")

run = jax.jit(jax.value_and_grad(vqa_loss, has_aux=True), static_argnums=7)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits, teacher = (3 * rng.normal(size=(2, B, K, T - 1, V))).astype(np.float32)
    ids = rng.integers(0, V, (B, K, T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(2, T + 1, (B, K, 1))
    return logits, ids, mask, teacher


def reference(logits, ids, mask, teacher, alpha, axis):
    """[B, K] sums over the tokens of each answer."""
    losses = np.zeros((B, K))
    odds = np.exp(np.float64(logits))
    wish = np.exp(np.float64(teacher))
    for b, k, place in np.ndindex(B, K, T):
        if place == 0 or not mask[b, k, place]:
            continue
        at = odds[b, k, place - 1]
        hard = -np.log(at[ids[b, k, place]] / at.sum())
        of_all = at.sum() if axis == "vocabulary" else odds[b, k].sum(axis=0)
        share = wish[b, k, place - 1] / wish[b, k, place - 1].sum()
        losses[b, k] += (1 - alpha) * hard - alpha * np.dot(share, np.log(at / of_all))
    return losses


@pytest.mark.parametrize(("alpha", "axis"), [(0.0, "vocabulary"), *((0.4, axis) for axis in AXES)])
def test_answers_are_weighted_and_questions_counted(batch, alpha, axis):
    logits, ids, mask, teacher = batch
    want = reference(*batch, alpha, axis)
    each = jax.jit(answer_losses, static_argnums=5)(logits, ids, mask, teacher, alpha, axis)
    np.testing.assert_allclose(each, want, rtol=1e-5)
    (loss_sum, count), _ = run(logits, ids, mask, WEIGHTS, VALID, teacher, alpha, axis)
    np.testing.assert_allclose(loss_sum, (WEIGHTS * VALID[:, None] * want).sum(), rtol=1e-5)
    assert count == 2
    assert loss_sum.dtype == count.dtype == jnp.float32


def test_without_a_teacher_there_is_the_hard_loss_alone(batch):
    logits, ids, mask, _ = batch
    hard, _ = run(logits, ids, mask, WEIGHTS, VALID, None, 0.4, "vocabulary")
    want = reference(*batch, 0.0, "vocabulary")
    np.testing.assert_allclose(hard[0], (WEIGHTS * VALID[:, None] * want).sum(), rtol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_absent_answers_and_invalid_questions_change_nothing(batch, axis):
    logits, ids, mask, teacher = batch
    keep = HERE[..., None, None]
    dirty = (
        np.where(keep, logits, np.nan),
        np.where(HERE[..., None], ids, -1).astype(np.int32),
        mask | ~HERE[..., None],
        np.where(VALID[:, None], WEIGHTS, np.nan),
        VALID,
        np.where(keep, teacher, np.nan),
    )
    clean = run(logits, ids, mask, WEIGHTS, VALID, teacher, 0.4, axis)
    dirty = run(*dirty, 0.4, axis)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(np.any(clean[1], axis=(-2, -1)), HERE)
