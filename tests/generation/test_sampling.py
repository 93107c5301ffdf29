"""Sampling: frequencies against the softmax, and what a text may depend on."""

import functools

import jax
import numpy as np
import pytest

from mplug_jax.generation.sampling import SampleConfig, sample
from mplug_jax.generation.scoring import sequence_log_probs

ROWS, DRAWS, VOCAB = 2, 4000, 12


@pytest.fixture(scope="module")
def setting(make_params, make_memory):
    return make_params(2, sep=3), *make_memory(52, 3)


@pytest.fixture(scope="module")
def texts_of(model, ids_of):
    """Compiled sampling of texts of up to 6 tokens, 4 a picture."""
    config = SampleConfig(samples=4, max_length=6, min_length=2, top_p=0.95)
    return jax.jit(
        lambda params, memory, mask, key, row_ids: sample(
            model, params, memory, mask, config, key, row_ids=row_ids, **ids_of
        )
    )


def first_token_probs(log_probs, config, allowed):
    """What ``config`` makes of one row of log p ``[vocab]``, written plainly."""
    possible = allowed & ~np.isin(np.arange(VOCAB), [0, 1])
    logits = np.where(possible, log_probs / config.temperature, -np.inf)
    order = np.argsort(-logits)
    probs = np.zeros(VOCAB)
    for token in order[: config.top_k]:
        probs[token] = np.exp(logits[token])
    probs /= probs.sum()
    reached, kept = 0.0, np.zeros(VOCAB)
    for token in order:
        if reached < config.top_p:
            kept[token] = probs[token]
            reached += probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"top_p": 1.0}, [10, 10]),
        ({"top_p": 1.0, "top_k": 4, "temperature": 0.5}, [4, 4]),
        ({"top_p": 0.8, "temperature": 2.0}, None),
        ({"top_p": 0.7, "top_k": 5, "temperature": 1.5, "banned": 3}, None),
    ],
)
def test_frequencies_are_the_softmax_cut_off(
    make_params, make_memory, model, reader, ids_of, options, support
):
    params, (memory, mask) = make_params(11), make_memory(5, ROWS)
    allowed = np.arange(VOCAB) != options.get("banned", -1)
    settings = {name: value for name, value in options.items() if name != "banned"}
    config = SampleConfig(samples=DRAWS, max_length=1, **settings)
    run = jax.jit(functools.partial(sample, model, config=config, allowed=allowed, **ids_of))
    got = run(params, memory, mask, rng=jax.random.key(3))
    assert got.ids.shape == (ROWS, DRAWS, 1) and np.all(got.lengths == 1)
    for row in range(ROWS):
        log_probs = reader(params, memory[row], mask[row])((ids_of["cls_id"],))
        probs = first_token_probs(log_probs, config, allowed)
        counts = np.bincount(np.asarray(got.ids[row, :, 0]), minlength=VOCAB)
        assert not counts[probs == 0].any()
        assert 1 < (probs > 0).sum() < (11 if support else 10)
        assert support is None or (probs > 0).sum() == support[row]
        expected = DRAWS * probs[probs > 0]
        chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
        # 99.9 % quantile of chi-square with 9 degrees of freedom; fewer only lower it.
        assert chi_square < 27.9


def test_texts_depend_on_key_and_row_id_alone(setting, make_memory, texts_of):
    params, memory, mask = setting
    key, row_ids = jax.random.key(0), np.array([10, 11, 12])
    got = texts_of(params, memory, mask, key, row_ids)
    again = texts_of(params, memory, mask, key, row_ids)
    np.testing.assert_array_equal(again.ids, got.ids)
    assert np.any(texts_of(params, memory, mask, jax.random.key(1), row_ids).ids != got.ids)
    assert np.any(texts_of(params, memory, mask, key, row_ids + 1).ids != got.ids)

    others, other_mask = make_memory(77, 3)
    others[2], other_mask[2] = memory[0], mask[0]
    moved = texts_of(params, others, other_mask, key, np.array([5, 6, 10]))
    np.testing.assert_array_equal(moved.ids[2], got.ids[0])
    np.testing.assert_allclose(moved.log_probs[2], got.log_probs[0], atol=1e-5)
    # The same picture under another id, and the samples of one picture, are drawn apart.
    assert np.any(moved.ids[2] != moved.ids[1])
    assert len({tuple(text) for text in got.ids[0].tolist()}) > 1


def test_log_probs_and_lengths_are_those_of_the_texts(setting, model, texts_of, ids_of):
    params, memory, mask = setting
    got = texts_of(params, memory, mask, jax.random.key(4), np.arange(3))
    ids, lengths = np.asarray(got.ids), np.asarray(got.lengths)
    assert lengths.min() < 6 and lengths.max() <= 6
    for text, length in zip(ids.reshape(-1, 6), lengths.reshape(-1), strict=True):
        assert length == 6 or text[length - 1] == ids_of["sep_id"]
        assert not np.isin(text[: length - 1], [0, 1, 2]).any() and not text[length:].any()
    assert lengths.min() > 2
    assert got.steps == lengths.max()
    read = jax.jit(functools.partial(sequence_log_probs, model, cls_id=ids_of["cls_id"]))
    want = read(params, got.ids, got.mask, memory, mask)
    np.testing.assert_allclose(got.log_probs, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"samples": 0}, "at least 1 text a picture, got 0"),
        ({"max_length": 3, "min_length": 3}, "min_length 3"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**options)
