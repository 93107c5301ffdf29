"""Soft targets against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.distillation import mix, soft_cross_entropy


def reference(logits, teacher_logits):
    """Cross-entropy of one position, both lists of V numbers."""
    logits, teacher_logits = np.float64(logits), np.float64(teacher_logits)
    teacher = np.exp(teacher_logits - teacher_logits.max())
    teacher /= teacher.sum()
    log_z = logits.max() + np.log(sum(np.exp(x - logits.max()) for x in logits))
    return -sum(p * (x - log_z) for p, x in zip(teacher, logits, strict=True))


def draws(shape, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(2, *shape))).astype(np.float32)


def test_runs_over_the_vocabulary_axis():
    logits, teacher = draws((2, 3, 7))
    got = soft_cross_entropy(logits, teacher)
    want = [[reference(logits[b, t], teacher[b, t]) for t in range(3)] for b in range(2)]
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_official_axis_normalises_the_student_over_positions():
    logits, teacher = draws((2, 3, 7))
    got = jax.jit(soft_cross_entropy, static_argnums=2)(logits, teacher, "sequence")
    want = np.zeros((2, 3))
    for b, t, v in np.ndindex(2, 3, 7):
        column = np.exp(np.float64(logits[b, :, v]))
        wish = np.exp(np.float64(teacher[b, t]))
        want[b, t] -= wish[v] / wish.sum() * np.log(column[t] / column.sum())
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="'vocab' is unknown; choose vocabulary or sequence"):
        soft_cross_entropy(*draws((2, 3)), "vocab")


def test_gradient_is_student_minus_teacher_and_never_reaches_the_teacher():
    logits, teacher = draws((4, 5), seed=1)
    run = jax.jit(jax.grad(lambda a, b: soft_cross_entropy(a, b).sum(), argnums=(0, 1)))
    grads = run(logits, teacher)
    np.testing.assert_allclose(
        grads[0], jax.nn.softmax(logits) - jax.nn.softmax(teacher), atol=1e-6
    )
    assert not np.any(grads[1])


def test_entries_both_rule_out_cost_nothing():
    logits, teacher = draws((2, 6), seed=2)
    full = np.concatenate([logits, np.full((2, 1), -np.inf, np.float32)], axis=1)
    full_teacher = np.concatenate([teacher, np.full((2, 1), -np.inf, np.float32)], axis=1)
    np.testing.assert_allclose(
        soft_cross_entropy(full, full_teacher), soft_cross_entropy(logits, teacher), rtol=1e-6
    )
    grad = jax.jit(jax.grad(lambda x: soft_cross_entropy(x, full_teacher).sum()))(full)
    assert np.all(np.isfinite(grad)) and not np.any(grad[:, -1])


def test_a_broken_teacher_shows():
    logits, teacher = draws((2, 6), seed=4)
    teacher[1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(soft_cross_entropy(logits, teacher)), [False, True])


def test_bfloat16_inputs_are_computed_in_float32():
    logits, teacher = (jnp.array(x, jnp.bfloat16) for x in draws((1, 300), seed=3, scale=8.0))
    got = soft_cross_entropy(logits, teacher)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], reference(logits[0], teacher[0]), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_mix(alpha):
    np.testing.assert_allclose(mix(jnp.array([2.0]), jnp.array([5.0]), alpha), [2.0 + 3.0 * alpha])
