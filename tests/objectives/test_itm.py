"""Hard negatives (weights, draws) and the matching loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.itm import (
    ITMNegatives,
    itm_labels,
    itm_loss,
    itm_mask,
    negative_weights,
    sample_negatives,
)

B = 6
IDS = np.array([3, 8, 3, 5, 8, 9], np.int32)
VALID = np.array([True, True, True, False, True, True])
DRAWS = 20_000


@pytest.fixture
def sims():
    """Image-to-text and text-to-image."""
    return (np.random.default_rng(0).normal(size=(2, B, B)) * 2).astype(np.float32)


def official_weights(sims, ids, valid):
    """Softmax over the valid batch, equal ids zeroed, normalised as torch.multinomial does."""
    weights = np.zeros(sims.shape)
    for i in np.flatnonzero(valid):
        for j in np.flatnonzero(valid):
            over = sum(np.exp(np.float64(sims[i, k])) for k in np.flatnonzero(valid))
            weights[i, j] = 0 if ids[i] == ids[j] else np.exp(np.float64(sims[i, j])) / over
        if weights[i].sum() > 0:
            weights[i] /= weights[i].sum()
    return weights


@pytest.mark.parametrize("valid", [np.ones(B, bool), VALID], ids=["all", "some"])
def test_weights_are_the_official_distribution(sims, valid):
    got = negative_weights(sims[0], IDS, valid)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, official_weights(sims[0], IDS, valid), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(got, jax.jit(negative_weights)(sims[0], IDS, valid))


def test_weights_survive_a_dominant_pair():
    """Where the softmax over the batch gives every candidate 0, the order among them remains."""
    sims = np.full((B, B), -2000.0, np.float32)
    np.fill_diagonal(sims, 2000.0)
    sims[1, 5] += np.log(3.0)
    weights = negative_weights(sims, np.arange(B), np.ones(B, bool))
    np.testing.assert_allclose(weights.sum(axis=1), np.ones(B), rtol=1e-6)
    np.testing.assert_allclose(weights[0], [0, 0.2, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(weights[1, 5] / weights[1, 0], 3, rtol=1e-3)


def test_weights_pass_no_gradient(sims):
    assert not np.any(jax.grad(lambda s: negative_weights(s, IDS, VALID).max())(sims[0]))


def draw_many(sims, ids, valid):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return jax.jit(jax.vmap(lambda key: sample_negatives(key, *sims, ids, valid)))(keys)


def test_draws_follow_the_weights(sims):
    drawn = draw_many(sims, IDS, VALID)
    for columns, ok, own in (
        (drawn.text_for_image, drawn.text_ok, sims[0]),
        (drawn.image_for_text, drawn.image_ok, sims[1]),
    ):
        weights = official_weights(own, IDS, VALID)
        assert columns.dtype == jnp.int32
        np.testing.assert_array_equal(np.all(ok, axis=0), VALID)
        np.testing.assert_array_equal(np.any(ok, axis=0), VALID)
        for i in np.flatnonzero(VALID):
            counts = np.bincount(columns[:, i], minlength=B)
            assert np.all(counts[weights[i] == 0] == 0)
            sigma = np.sqrt(DRAWS * weights[i] * (1 - weights[i]))
            # 44 shares are looked at: four deviations keep a false alarm below 1 in 300.
            assert np.all(abs(counts - DRAWS * weights[i]) <= 4 * sigma + 1e-9)
        assert not np.any(columns[:, ~VALID])


def test_texts_and_images_are_drawn_apart():
    same = np.zeros((B, B), np.float32)
    drawn = sample_negatives(jax.random.key(0), same, same, np.arange(B), np.ones(B, bool))
    assert np.any(drawn.text_for_image != drawn.image_for_text)


def test_dominant_pairs_still_draw():
    sims = np.full((B, B), -3000.0, np.float32)
    np.fill_diagonal(sims, 3000.0)
    drawn = draw_many((sims, sims), np.arange(B), np.ones(B, bool))
    assert np.all(drawn.text_ok) and np.all(drawn.image_ok)
    assert not np.any(drawn.text_for_image == np.arange(B))
    counts = np.bincount(drawn.text_for_image[:, 2], minlength=B)
    assert np.all(abs(counts[[0, 1, 3, 4, 5]] - DRAWS / 5) < 4 * np.sqrt(DRAWS * 0.2 * 0.8))


@pytest.mark.parametrize(
    ("ids", "valid"),
    [
        (np.full(B, 4, np.int32), np.ones(B, bool)),
        (np.arange(B, dtype=np.int32), np.arange(B) == 2),
        (np.arange(B, dtype=np.int32), np.zeros(B, bool)),
    ],
    ids=["one picture", "one valid row", "no valid row"],
)
def test_no_candidate_is_reported(sims, ids, valid):
    drawn = sample_negatives(jax.random.key(0), *sims, ids, valid)
    assert not np.any(drawn.text_ok) and not np.any(drawn.image_ok)
    assert not np.any(drawn.text_for_image) and not np.any(drawn.image_for_text)
    assert np.all(np.isfinite(negative_weights(sims[0], ids, valid)))


@pytest.mark.parametrize("garbage", [1e30, np.nan])
def test_invalid_rows_change_no_draw(sims, garbage):
    dirty = sims.copy()
    dirty[:, ~VALID, :] = garbage
    dirty[:, :, ~VALID] = garbage
    dirty_ids = np.where(VALID, IDS, 9).astype(np.int32)
    clean = sample_negatives(jax.random.key(1), *sims, IDS, VALID)
    other = sample_negatives(jax.random.key(1), *dirty, dirty_ids, VALID)
    for a, b in zip(clean, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_are_pairs_then_negative_images_then_negative_texts():
    np.testing.assert_array_equal(itm_labels(3), [1, 1, 1, 0, 0, 0, 0, 0, 0])
    negatives = ITMNegatives(
        text_for_image=jnp.array([1, 0]),
        text_ok=jnp.array([True, False]),
        image_for_text=jnp.array([1, 0]),
        image_ok=jnp.array([False, True]),
    )
    got = itm_mask(jnp.array([True, True]), negatives)
    np.testing.assert_array_equal(got, [True, True, False, True, True, False])


def test_loss():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3 * B, 2)).astype(np.float32) * 4
    labels, mask = itm_labels(B), rng.random(3 * B) < 0.7
    want = 0.0
    for i in np.flatnonzero(mask):
        margin = np.float64(logits[i, 1]) - np.float64(logits[i, 0])
        want += np.log1p(np.exp(-margin if i < B else margin))
    for function in (itm_loss, jax.jit(itm_loss)):
        loss_sum, count = function(logits, labels, mask)
        assert loss_sum.dtype == count.dtype == jnp.float32
        np.testing.assert_allclose(loss_sum, want, rtol=1e-5)
        assert count == mask.sum()


def test_masked_rows_reach_neither_loss_nor_gradient():
    rng = np.random.default_rng(4)
    mask = np.arange(3 * B) % 3 != 1
    logits = rng.normal(size=(3 * B, 2)).astype(np.float32)
    run = jax.jit(jax.value_and_grad(lambda x: itm_loss(x, itm_labels(B), mask)[0]))
    value, grad = run(logits)
    dirty_value, dirty_grad = run(np.where(mask[:, None], logits, np.nan))
    assert value == dirty_value
    np.testing.assert_array_equal(grad, dirty_grad)
    is_label = np.arange(2) == np.asarray(itm_labels(B))[:, None]
    np.testing.assert_allclose(grad, (jax.nn.softmax(logits) - is_label) * mask[:, None], atol=1e-6)


# Of four rows each; in the first, rows 0 and 2 show one picture and row 3 is invalid; in the second
# only row 6 is valid; in the third all show one picture.
POOL_IDS = np.array([3, 8, 3, 5, 8, 9, 3, 7, 1, 1, 1, 1], np.int32)
POOL_VALID = np.array([1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1], bool)


def test_weights_of_pools_are_those_of_each_pool_alone():
    sims = np.random.default_rng(5).normal(size=(12, 12)).astype(np.float32)
    got = np.array(negative_weights(sims, POOL_IDS, POOL_VALID, pools=3))
    for first in (0, 4, 8):
        own = slice(first, first + 4)
        want = official_weights(sims[own, own], POOL_IDS[own], POOL_VALID[own])
        np.testing.assert_allclose(got[own, own], want, rtol=1e-5, atol=1e-8)
        got[own, own] = 0
    assert not got.any()


def test_draws_of_pools_stay_in_the_pool():
    sims = np.zeros((2, 12, 12), np.float32)
    keys = jax.random.split(jax.random.key(3), 200)
    drawn = jax.jit(
        jax.vmap(lambda key: sample_negatives(key, *sims, POOL_IDS, POOL_VALID, pools=3))
    )(keys)
    for columns, ok in (
        (drawn.text_for_image, drawn.text_ok),
        (drawn.image_for_text, drawn.image_ok),
    ):
        np.testing.assert_array_equal(ok, np.tile(np.arange(12) < 3, (200, 1)))
        assert set(np.unique(columns[:, 0])) == set(np.unique(columns[:, 2])) == {1}
        assert set(np.unique(columns[:, 1])) == {0, 2}


def test_more_than_one_pool_excludes_rows_that_one_pool_draws():
    sims = np.zeros((B, B), np.float32)
    one, two = (negative_weights(sims, np.arange(B), np.ones(B, bool), pools=g) for g in (1, 2))
    np.testing.assert_allclose(one[0], [0, 0.2, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(two[0], [0, 0.5, 0.5, 0, 0, 0], rtol=1e-6)
