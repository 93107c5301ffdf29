"""The log-likelihood of texts, against reading each text token by token."""

import functools

import jax
import numpy as np
import pytest

from mplug_jax.generation.scoring import sequence_log_probs

ROWS = 2


@pytest.fixture(scope="module")
def setting(make_params, make_memory):
    """Parameters, memory, mask; ids and mask of three texts a picture, one of them empty."""
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 12, (ROWS, 3, 5))
    text_mask = np.arange(5) < np.array([[5, 2, 4], [3, 0, 5]])[..., None]
    return make_params(4), *make_memory(6, ROWS), np.where(text_mask, ids, -1), text_mask


@pytest.fixture(scope="module")
def score(model, ids_of):
    """Compiled scoring; prompt and random streams are arguments as well."""
    return jax.jit(functools.partial(sequence_log_probs, model, cls_id=ids_of["cls_id"]))


@pytest.mark.parametrize("prompt", [None, np.array([[1, 7, 4], [1, 3, 9]])])
def test_scores_are_those_of_each_token(setting, score, reader, ids_of, prompt):
    params, memory, mask, ids, text_mask = setting
    got = score(params, ids, text_mask, memory, mask, prompt_ids=prompt)
    for row, picture in enumerate(ids):
        log_probs = reader(params, memory[row], mask[row])
        start = (ids_of["cls_id"],) if prompt is None else tuple(prompt[row].tolist())
        for number, text in enumerate(picture.tolist()):
            for t, token in enumerate(text):
                want = log_probs((*start, *text[:t]))[token] if text_mask[row, number, t] else 0.0
                np.testing.assert_allclose(got[row, number, t], want, rtol=1e-5, atol=1e-5)


def test_gradient_is_the_slope_and_padding_has_none(setting, model, ids_of):
    params, memory, mask, ids, text_mask = setting
    weights = np.random.default_rng(0).normal(size=ids.shape[:2])

    @jax.jit
    @jax.value_and_grad
    def total(memory, text_mask):
        log_probs = sequence_log_probs(
            model, params, ids, text_mask, memory, mask, cls_id=ids_of["cls_id"]
        )
        return (log_probs.sum(-1) * weights).sum()

    _, gradient = total(memory, text_mask)
    direction = np.where(mask[..., None], np.random.default_rng(1).normal(size=memory.shape), 0)
    step = 1e-2 * direction.astype(np.float32)
    rise = total(memory + step, text_mask)[0] - total(memory - step, text_mask)[0]
    np.testing.assert_allclose((gradient * step).sum(), rise / 2, rtol=0.02)
    # A picture whose texts do not count pulls at nothing.
    first_only = text_mask & (np.arange(ROWS) == 0)[:, None, None]
    _, gradient = total(memory, first_only)
    assert np.abs(gradient[0]).max() > 1e-3 and not np.any(gradient[1])


def test_scores_under_dropout_differ(setting, score):
    params, memory, mask, ids, text_mask = setting
    plain = score(params, ids, text_mask, memory, mask)
    dropped = score(params, ids, text_mask, memory, mask, rngs={"dropout": jax.random.key(0)})
    assert np.abs(plain - dropped)[text_mask].min() > 0 and not np.any(dropped[~text_mask])
