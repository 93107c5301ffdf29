"""Moving average of a parameter tree, and the ramp of the distillation weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.momentum import alpha_ramp, ema


def test_average_after_several_steps_is_the_weighted_sum_of_all_parameters():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(5, 3)).astype(np.float32)
    momentum = {"a": {"kernel": jnp.array(history[0])}, "b": jnp.array(history[0, :1])}
    for params in history[1:]:
        online = {"a": {"kernel": jnp.array(params)}, "b": jnp.array(params[:1])}
        momentum = jax.jit(ema)(momentum, online, 0.9)
    weights = np.array([0.9**4, *(0.1 * 0.9 ** (4 - k) for k in range(1, 5))])
    np.testing.assert_allclose(momentum["a"]["kernel"], weights @ history, rtol=1e-5)
    np.testing.assert_allclose(momentum["b"], weights @ history[:, :1], rtol=1e-5)


@pytest.mark.parametrize(("own", "other"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_average_keeps_its_own_dtype(own, other):
    got = ema({"w": jnp.ones(2, own)}, {"w": jnp.zeros(2, other)}, 0.75)
    assert got["w"].dtype == own
    np.testing.assert_array_equal(got["w"].astype(jnp.float32), [0.75, 0.75])


def test_trees_that_differ_are_refused():
    with pytest.raises(ValueError):
        ema({"w": jnp.ones(2)}, {"v": jnp.ones(2)}, 0.9)


@pytest.mark.parametrize(
    ("step", "ramp_steps", "want"),
    [(0, 10, 0.0), (5, 10, 0.2), (10, 10, 0.4), (1000, 10, 0.4), (0, 0, 0.4), (7, 0, 0.4)],
)
def test_ramp(step, ramp_steps, want):
    got = alpha_ramp(step, 0.4, ramp_steps)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    traced = jax.jit(lambda s: alpha_ramp(s, 0.4, ramp_steps))(jnp.int32(step))
    np.testing.assert_allclose(traced, want, rtol=1e-6)


def test_negative_ramp_is_refused():
    with pytest.raises(ValueError, match="-3"):
        alpha_ramp(0, 0.4, -3)
