"""Self-critical loss against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.scst import beam_scores, scst_loss

B, K, T, V = 3, 3, 6, 8
VALID = np.array([True, False, True])
# Tokens with [CLS]; the last picture has found two texts alone.
LENGTHS = np.array([[6, 4, 5], [3, 3, 3], [2, 6, 1]])
PENALTY = 0.6

OPTIONS = ("length_penalty", "prompt_length")
run = jax.jit(jax.value_and_grad(scst_loss, has_aux=True), static_argnames=OPTIONS)
scores_of = jax.jit(beam_scores, static_argnames=OPTIONS)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(B, K, T - 1, V))).astype(np.float32)
    ids = rng.integers(0, V, (B, K, T)).astype(np.int32)
    rewards = rng.uniform(0, 2, (B, K)).astype(np.float32)
    return logits, ids, np.arange(T) < LENGTHS[..., None], rewards, VALID


def score(logits, ids, length, prompt_length=1, penalty=PENALTY):
    """Of one text: sum log p / ((5 + generated) / 6) ** penalty."""
    total = 0.0
    for place in range(prompt_length, length):
        odds = np.exp(np.float64(logits[place - 1]))
        total += np.log(odds[ids[place]] / odds.sum())
    return total / ((5 + length - prompt_length) / 6) ** penalty


def reference(logits, ids, rewards, valid, greedy=None, prompt_length=1):
    total, count = 0.0, 0
    for b in np.flatnonzero(valid):
        texts = [k for k in range(K) if LENGTHS[b, k] > prompt_length]
        baseline = np.mean([rewards[b, k] for k in texts]) if greedy is None else greedy[b]
        for k in texts:
            length = LENGTHS[b, k]
            own = score(logits[b, k], ids[b, k], length, prompt_length)
            total -= own / length * (rewards[b, k] - baseline)
            count += 1
    return total, count


@pytest.mark.parametrize(("prompt_length", "penalty"), [(1, 0.6), (3, 0.6), (1, 0.0)])
def test_scores_are_those_of_beam_search(batch, prompt_length, penalty):
    logits, ids, mask, *_ = batch
    got = scores_of(logits, ids, mask, length_penalty=penalty, prompt_length=prompt_length)
    want = [
        [score(logits[b, k], ids[b, k], LENGTHS[b, k], prompt_length, penalty) for k in range(K)]
        for b in range(B)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("prompt_length", [1, 2])
def test_own_texts_are_the_baseline(batch, prompt_length):
    logits, ids, _, rewards, valid = batch
    (loss_sum, count), _ = run(*batch, prompt_length=prompt_length)
    want = reference(logits, ids, rewards, valid, prompt_length=prompt_length)
    np.testing.assert_allclose(loss_sum, want[0], rtol=1e-5)
    assert count == want[1] == (5 if prompt_length == 1 else 4)
    assert loss_sum.dtype == count.dtype == jnp.float32


def test_greedy_texts_as_the_baseline(batch):
    logits, ids, _, rewards, valid = batch
    greedy = np.array([0.3, np.nan, 1.7], np.float32)
    (loss_sum, count), _ = run(*batch, greedy_rewards=greedy)
    want = reference(logits, ids, rewards, valid, greedy)
    np.testing.assert_allclose(loss_sum, want[0], rtol=1e-5)
    assert count == want[1]


def test_gradient_is_the_advantage_times_that_of_the_score(batch):
    logits, ids, mask, rewards, _ = batch
    _, grad = run(*batch)
    scale = ((5 + LENGTHS - 1) / 6) ** PENALTY * LENGTHS
    texts = LENGTHS > 1
    baseline = (rewards * texts).sum(axis=1, keepdims=True) / texts.sum(axis=1, keepdims=True)
    factor = np.where(texts & VALID[:, None], -(rewards - baseline) / scale, 0.0)
    odds = np.exp(np.float64(logits))
    step = np.eye(V)[ids[..., 1:]] - odds / odds.sum(axis=-1, keepdims=True)
    want = factor[..., None, None] * step * mask[..., 1:, None]
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_padding_missing_texts_and_invalid_rows_change_nothing(batch):
    logits, ids, mask, rewards, valid = batch
    used = mask[..., 1:] & valid[:, None, None]
    exists = (LENGTHS > 1) & valid[:, None]
    dirty = (
        np.where(used[..., None], logits, np.nan),
        np.where(np.pad(used, ((0, 0), (0, 0), (1, 0))), ids, -1).astype(np.int32),
        mask | ~valid[:, None, None],
        np.where(exists, rewards, np.nan),
        valid,
    )
    clean, dirty = run(*batch), run(*dirty)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(np.any(clean[1], axis=-1), used)


def test_equal_rewards_teach_nothing(batch):
    logits, ids, mask, _, valid = batch
    (loss_sum, count), grad = run(logits, ids, mask, np.full((B, K), 0.75, np.float32), valid)
    assert loss_sum == 0 and count == 5
    assert not np.any(grad)
