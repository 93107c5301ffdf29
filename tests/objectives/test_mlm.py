"""What `mask_tokens` draws: shares, exclusions, determinism."""

import jax
import numpy as np
import pytest

from mplug_jax.objectives import mlm

# Compiled once an option set; eagerly every small operation would be compiled by itself.
mask_tokens = jax.jit(
    mlm.mask_tokens, static_argnames=("mask_id", "special_ids", "vocab_size", "rate")
)

VOCAB = 60
CLS, SEP, MASK, PAD = 1, 7, 4, 59
SPECIAL = (CLS, SEP, MASK, PAD)
OPTIONS = {"mask_id": MASK, "special_ids": SPECIAL, "vocab_size": VOCAB}


def texts(rows=2000, length=24, seed=0):
    """[CLS] ordinary words [SEP] padding, of random lengths."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(VOCAB), SPECIAL)
    ids = rng.choice(ordinary, (rows, length)).astype(np.int32)
    lengths = rng.integers(3, length + 1, (rows, 1))
    places = np.arange(length)
    ids[:, 0] = CLS
    ids = np.where(places == lengths - 1, SEP, ids)
    mask = places < lengths
    # Padding carries an ordinary id here, so that only the mask can exclude it.
    return ids.astype(np.int32), mask


def within_three_sigma(hits, trials, share):
    return abs(hits - trials * share) <= 3 * np.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_shares_are_berts(rate):
    ids, mask = texts()
    masked, _, drawn = map(
        np.asarray, mask_tokens(jax.random.key(3), ids, mask, rate=rate, **OPTIONS)
    )
    maskable = mask & ~np.isin(ids, SPECIAL)
    count = drawn.sum()
    assert within_three_sigma(count, maskable.sum(), rate)
    assert within_three_sigma((masked[drawn] == MASK).sum(), count, 0.8)
    # A random token is by chance the original one in 1 of 56 draws.
    same = 0.1 + 0.1 / (VOCAB - len(SPECIAL))
    assert within_three_sigma((masked[drawn] == ids[drawn]).sum(), count, same)


def test_only_ordinary_real_tokens_are_drawn_and_nothing_else_changes():
    ids, mask = texts(seed=1)
    masked, labels, drawn = mask_tokens(jax.random.key(0), ids, mask, rate=1.0, **OPTIONS)
    np.testing.assert_array_equal(drawn, mask & ~np.isin(ids, SPECIAL))
    np.testing.assert_array_equal(np.asarray(masked)[~drawn], ids[~drawn])
    np.testing.assert_array_equal(np.asarray(labels)[drawn], ids[drawn])
    assert np.all(np.asarray(labels)[~drawn] == -100)


def test_random_tokens_are_uniform_over_the_ordinary_ones():
    # All originals are the same word, so every other id that appears was drawn at random.
    ids = np.full((2000, 24), 10, np.int32)
    masked, _, _ = mask_tokens(jax.random.key(5), ids, ids == 10, rate=1.0, **OPTIONS)
    counts = np.bincount(np.asarray(masked).ravel(), minlength=VOCAB)
    others = np.setdiff1d(np.arange(VOCAB), [*SPECIAL, 10])
    assert np.all(counts[[CLS, SEP, PAD]] == 0)
    expected = ids.size * 0.1 / (VOCAB - len(SPECIAL))
    chi_square = np.sum((counts[others] - expected) ** 2 / expected)
    # 55 frequencies: mean 55, deviation sqrt(110); four of those to either side.
    assert 13 < chi_square < 97


def test_mask_token_counts_as_special_even_if_not_listed():
    ids = np.full((200, 20), 8, np.int32)
    ids[:, :5] = MASK
    masked, _, drawn = mask_tokens(
        jax.random.key(0), ids, ids >= 0, mask_id=MASK, special_ids=(2,), vocab_size=9, rate=1.0
    )
    np.testing.assert_array_equal(drawn, ids == 8)
    assert set(np.unique(masked)) == set(range(9)) - {2}


def test_no_token_to_draw_is_fine():
    ids, mask = texts()
    ids = np.where(mask, np.where(ids % 2, CLS, SEP), ids).astype(np.int32)
    masked, _, drawn = mask_tokens(jax.random.key(0), ids, mask, rate=1.0, **OPTIONS)
    assert not np.any(drawn)
    np.testing.assert_array_equal(masked, ids)


def test_same_key_same_masks_and_jit_agrees():
    ids, mask = texts()

    def draw(key, function=mask_tokens):
        return function(key, ids, mask, rate=0.15, **OPTIONS)

    first, other = draw(jax.random.key(0)), draw(jax.random.key(1))
    for a, b in zip(first, draw(jax.random.key(0), mlm.mask_tokens), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first[2] != other[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1.5}, "rate"),
        ({"special_ids": (60,)}, "vocabulary of 60"),
        ({"special_ids": (-1,)}, "vocabulary of 60"),
        ({"special_ids": tuple(range(60))}, "vocabulary of 60"),
    ],
)
def test_impossible_options_are_refused(change, message):
    ids, mask = texts(rows=2)
    with pytest.raises(ValueError, match=message):
        mask_tokens(jax.random.key(0), ids, mask, **{**OPTIONS, **change})
