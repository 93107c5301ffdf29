"""Token cross-entropy, masked and prefix language modelling losses against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.distillation import SOFTMAX_AXES
from mplug_jax.objectives.mlm import mlm_loss
from mplug_jax.objectives.prefix_lm import prefix_lm_loss
from mplug_jax.objectives.token_losses import cross_entropy, token_cross_entropy

B, L, V = 4, 6, 9


def reference(logits, labels, mask, teacher=None, alpha=0.0, axis="vocabulary"):
    """Sum and count over the positions of `mask`, one token at a time."""
    total, count = 0.0, 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        odds = np.exp(np.float64(logits[b, t]))
        loss = -np.log(odds[labels[b, t]] / odds.sum())
        if teacher is not None:
            wish = np.exp(np.float64(teacher[b, t]))
            of_all = odds.sum()
            if axis == "sequence":
                of_all = np.exp(np.float64(logits[b])).sum(axis=0)
            soft = -np.dot(wish / wish.sum(), np.log(odds / of_all))
            loss = (1 - alpha) * loss + alpha * soft
        total, count = total + loss, count + 1
    return total, count


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(B, L, V)).astype(np.float32) * 3,
        "teacher": rng.normal(size=(B, L, V)).astype(np.float32) * 3,
        "labels": rng.integers(0, V, (B, L)).astype(np.int32),
        "mask": np.arange(L) < np.array([[6], [3], [4], [0]]),
    }


@pytest.mark.parametrize("distilled", [False, True])
def test_sum_and_count(batch, distilled):
    teacher = batch["teacher"] if distilled else None
    args = (batch["logits"], batch["labels"], batch["mask"], teacher, 0.4)
    want = reference(*args)
    for function in (token_cross_entropy, jax.jit(token_cross_entropy)):
        loss_sum, count = function(*args)
        assert loss_sum.dtype == count.dtype == jnp.float32
        assert loss_sum.shape == count.shape == ()
        np.testing.assert_allclose(loss_sum, want[0], rtol=1e-5)
        assert count == want[1] == 13


@pytest.mark.parametrize("axis", SOFTMAX_AXES)
def test_gradient_matches_finite_differences_of_the_reference(batch, axis):
    rest = (batch["labels"], batch["mask"], batch["teacher"], 0.3, axis)
    run = jax.jit(jax.value_and_grad(lambda x: token_cross_entropy(x, *rest)[0]))
    value, grad = run(batch["logits"])
    np.testing.assert_allclose(value, reference(batch["logits"], *rest)[0], rtol=1e-5)
    step = 1e-5
    # (1, 3, 0) is padding, which counts only if the softmax runs over the sequence.
    assert (grad[1, 3, 0] != 0) == (axis == "sequence")
    for index in [(0, 0, 0), (0, 5, 8), (1, 2, 4), (2, 3, 1), (1, 3, 0), (3, 0, 2)]:
        up, down = np.float64(batch["logits"]), np.float64(batch["logits"])
        up[index] += step
        down[index] -= step
        slope = (reference(up, *rest)[0] - reference(down, *rest)[0]) / (2 * step)
        np.testing.assert_allclose(grad[index], slope, atol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_masked_positions_reach_neither_loss_nor_gradient(batch, garbage):
    mask = batch["mask"]
    logits, teacher = batch["logits"].copy(), batch["teacher"].copy()
    labels = np.where(mask, batch["labels"], -100)
    logits[~mask], teacher[~mask] = garbage, garbage

    def loss(x, labels, teacher):
        return token_cross_entropy(x, labels, mask, teacher, 0.5)[0]

    run = jax.jit(jax.value_and_grad(loss))
    clean = run(batch["logits"], batch["labels"], batch["teacher"])
    dirty = run(logits, labels, teacher)
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert not np.any(dirty[1][~mask])


def test_no_position_gives_zero_and_zero(batch):
    nothing = np.zeros((B, L), bool)
    run = jax.value_and_grad(
        lambda x: token_cross_entropy(x, batch["labels"], nothing, batch["teacher"], 0.5)[0]
    )
    loss, grad = jax.jit(run)(batch["logits"])
    assert loss == 0 and not np.any(grad)
    assert token_cross_entropy(batch["logits"], batch["labels"], nothing)[1] == 0


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]]])
    labels = jnp.array([[1, 1]])
    mask = jnp.ones((1, 2), bool)
    run = jax.value_and_grad(lambda x: token_cross_entropy(x, labels, mask, x, 0.5)[0])
    loss, grad = jax.jit(run)(logits)
    np.testing.assert_allclose(loss, 1e4, rtol=1e-6)
    assert np.all(np.isfinite(grad))


def test_a_small_loss_among_large_logits_is_exact():
    logits = np.array([1000.0, 999.0, 980.0], np.float32)
    odds = np.exp(np.float64(logits) - 1000)
    want = -np.log(odds / odds.sum())
    got = [cross_entropy(logits, jnp.array(label)) for label in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.array(np.random.default_rng(1).normal(size=(1, 500)) * 5, jnp.bfloat16)
    odds = np.exp(np.float64(logits[0]))
    got = cross_entropy(logits, jnp.array([7]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], -np.log(odds[7] / odds.sum()), rtol=1e-5)


def test_shapes_that_disagree_are_named(batch):
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        token_cross_entropy(batch["logits"], batch["labels"][:, 1:], batch["mask"][:, 1:])
    with pytest.raises(ValueError, match="teacher"):
        token_cross_entropy(
            batch["logits"], batch["labels"], batch["mask"], batch["teacher"][..., 1:], 0.4
        )


def test_over_the_sequence_an_empty_text_reaches_neither_loss_nor_gradient(batch):
    def loss(logits, teacher):
        rest = (batch["labels"], batch["mask"], teacher, 0.5, "sequence")
        return token_cross_entropy(logits, *rest)[0]

    run = jax.jit(jax.value_and_grad(loss))
    logits, teacher = batch["logits"].copy(), batch["teacher"].copy()
    logits[3], teacher[3] = np.nan, np.nan
    clean, dirty = run(batch["logits"], batch["teacher"]), run(logits, teacher)
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])


def test_mlm_and_prefix_lm_pass_the_axis_on(batch):
    valid = np.array([True, True, False, True])
    more = (batch["teacher"], 0.4, "sequence")
    rows = batch["mask"] & valid[:, None]
    want = reference(batch["logits"], batch["labels"], rows, *more)
    got = jax.jit(mlm_loss, static_argnums=6)(
        batch["logits"], batch["labels"], batch["mask"], valid, *more
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    shift = ((0, 0), (1, 0))
    ids, mask = np.pad(batch["labels"], shift), np.pad(batch["mask"], shift)
    got = jax.jit(prefix_lm_loss, static_argnums=6)(batch["logits"], ids, mask, valid, *more)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
def test_prefix_lm_predicts_the_next_token_of_valid_rows(batch, distilled):
    """T = L + 1: the logits at t answer for token t + 1, and [SEP] is predicted too."""
    rng = np.random.default_rng(2)
    target_ids = rng.integers(0, V, (B, L + 1)).astype(np.int32)
    target_mask = np.arange(L + 1) < np.array([[7], [3], [2], [5]])
    valid = np.array([True, True, False, True])
    teacher = batch["teacher"] if distilled else None
    got = prefix_lm_loss(batch["logits"], target_ids, target_mask, valid, teacher, 0.4)
    labels, mask = np.zeros((B, L), int), np.zeros((B, L), bool)
    for b in range(B):
        for t in range(1, L + 1):
            labels[b, t - 1] = target_ids[b, t]
            mask[b, t - 1] = valid[b] and target_mask[b, t]
    want = reference(batch["logits"], labels, mask, teacher, 0.4)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1] == want[1] == 6 + 2 + 4


def test_prefix_lm_needs_one_position_less_than_tokens(batch):
    with pytest.raises(ValueError, match="need labels"):
        prefix_lm_loss(batch["logits"], batch["labels"], batch["mask"], np.ones(B, bool))


@pytest.mark.parametrize("distilled", [False, True])
def test_mlm_predicts_the_drawn_tokens_of_valid_rows(batch, distilled):
    label_mask = batch["mask"] & (np.arange(L) % 2 == 1)
    valid = np.array([True, False, True, True])
    teacher = batch["teacher"] if distilled else None
    labels = np.where(label_mask, batch["labels"], -100)
    got = mlm_loss(batch["logits"], labels, label_mask, valid, teacher, 0.4)
    want = reference(batch["logits"], labels, label_mask & valid[:, None], teacher, 0.4)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1] == want[1] == 3 + 2


def test_invalid_rows_change_nothing(batch):
    valid = np.array([True, False, True, False])
    other = batch["logits"].copy()
    other[~valid] = 1e30
    for loss in (mlm_loss, prefix_lm_loss):
        # Prefix LM reads one token more than there are logits.
        cut = slice(None) if loss is mlm_loss else slice(1, None)
        args = (batch["labels"], batch["mask"], valid)
        run = jax.jit(jax.value_and_grad(lambda x, f=loss, a=args: f(x, *a)[0]))
        clean, dirty = run(batch["logits"][:, cut]), run(other[:, cut])
        assert clean[0] == dirty[0] > 0
        np.testing.assert_array_equal(clean[1], dirty[1])
