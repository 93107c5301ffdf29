"""Captioning loss against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.captioning import caption_loss

B, T, V = 4, 7, 11
VALID = np.array([True, True, False, True])
LENGTHS = np.array([7, 4, 6, 5])

run = jax.jit(jax.value_and_grad(caption_loss, has_aux=True), static_argnums=4)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(B, T - 1, V))).astype(np.float32)
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    return logits, ids, np.arange(T) < LENGTHS[:, None], VALID


def reference(logits, ids, mask, valid, prompt_length):
    total, count = 0.0, 0
    for b in np.flatnonzero(valid):
        for place in range(prompt_length, mask[b].sum()):
            odds = np.exp(np.float64(logits[b, place - 1]))
            total -= np.log(odds[ids[b, place]] / odds.sum())
            count += 1
    return total, count


@pytest.mark.parametrize("prompt_length", [1, 2, 4])
def test_tokens_after_the_prompt_are_predicted(batch, prompt_length):
    (loss_sum, count), grad = run(*batch, prompt_length)
    want = reference(*batch, prompt_length)
    np.testing.assert_allclose(loss_sum, want[0], rtol=1e-5)
    assert count == want[1]
    assert loss_sum.dtype == count.dtype == jnp.float32
    places = np.arange(1, T)
    used = (places >= prompt_length) & (places < LENGTHS[:, None]) & VALID[:, None]
    np.testing.assert_array_equal(np.any(grad, axis=-1), used)


def test_what_is_not_predicted_changes_nothing(batch):
    logits, ids, mask, valid = batch
    places = np.arange(1, T)
    used = (places >= 3) & (places < LENGTHS[:, None]) & VALID[:, None]
    dirty_logits = np.where(used[..., None], logits, np.nan)
    dirty_ids = np.where(np.pad(used, ((0, 0), (1, 0))), ids, -1).astype(np.int32)
    clean, dirty = run(*batch, 3), run(dirty_logits, dirty_ids, mask, valid, 3)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("prompt_length", [0, T])
def test_a_prompt_without_cls_or_without_caption_is_refused(batch, prompt_length):
    with pytest.raises(ValueError, match=rf"prompt_length must be in 1\.\.6, got {prompt_length}"):
        caption_loss(*batch, prompt_length)
