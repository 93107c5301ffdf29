"""Answer ranking against NumPy over a decoder without cache."""

import functools

import jax
import numpy as np
import pytest

from mplug_jax.generation.ranking import rank_answers

ROWS = 3
# Two answers begin with the same token; their lengths differ.
ANSWERS = np.array(
    [
        [1, 5, 8, 2, 0],
        [1, 6, 2, 0, 0],
        [1, 5, 2, 0, 0],
        [1, 9, 4, 3, 2],
        [1, 3, 11, 2, 0],
        [1, 7, 2, 0, 0],
        [1, 4, 4, 4, 2],
    ]
)
MASK = ANSWERS != 0


@pytest.fixture(scope="module")
def setting(make_params, make_memory):
    return make_params(6, sep=1), *make_memory(8, ROWS)


@pytest.fixture(scope="module")
def log_probs(setting, reader):
    """log p ``[ROWS, answers, 4]`` of each answer's tokens, 0 on padding."""
    params, memory, mask = setting
    found = np.zeros((ROWS, len(ANSWERS), 4))
    for row in range(ROWS):
        read = reader(params, memory[row], mask[row])
        for i, answer in enumerate(ANSWERS):
            for t in range(1, int(MASK[i].sum())):
                found[row, i, t - 1] = read(tuple(answer[:t].tolist()))[answer[t]]
    return found


def expected(log_probs, k, first_counts):
    ids, probs = [], []
    for row in log_probs:
        short = np.argsort(-row[:, 0], kind="stable")[:k]
        scores = row[short].sum(-1) + (first_counts - 1) * row[short, 0]
        order = np.argsort(-scores, kind="stable")
        weights = np.exp(scores[order] - scores.max())
        ids.append(short[order])
        probs.append(weights / weights.sum())
    return np.array(ids), np.array(probs)


@pytest.mark.parametrize(
    ("score", "first_counts", "k", "chunk"),
    [("official", 2, 5, 16), ("likelihood", 1, 5, 2), ("likelihood", 1, 7, 3)],
)
def test_ranking_is_the_numpy_one(setting, log_probs, model, score, first_counts, k, chunk):
    rank = jax.jit(functools.partial(rank_answers, model, k=k, score=score, chunk=chunk))
    ids, probs = rank(*setting, ANSWERS, MASK)
    want_ids, want_probs = expected(log_probs, k, first_counts)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(probs, want_probs, atol=1e-5)
    # The cases differ: the first token counted twice changes the order, so does the short list.
    assert np.any(want_ids != expected(log_probs, k, 3 - first_counts)[0])
    assert k == 7 or np.any(want_ids != expected(log_probs, 7, first_counts)[0][:, :k])


def test_padding_of_answers_does_not_matter(setting, model):
    rank = jax.jit(functools.partial(rank_answers, model, k=5, chunk=2))
    ids, probs = rank(*setting, ANSWERS, MASK)
    other_ids, other_probs = rank(*setting, np.where(MASK, ANSWERS, 10), MASK)
    np.testing.assert_array_equal(other_ids, ids)
    np.testing.assert_array_equal(other_probs, probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "exact"}, "'exact' is unknown; choose one of: likelihood, official"),
        ({"k": 8}, "k=8 answers cannot be ranked of a list of 7"),
        ({"answer_ids": ANSWERS[:, :2]}, "3 tokens or more; these have 2"),
        ({"answer_ids": np.ones((7, 11), int)}, "10 tokens to read do not fit the 9 positions"),
    ],
)
def test_mistakes_are_told(setting, model, options, message):
    given = {"answer_ids": ANSWERS, "answer_mask": MASK, "k": 5} | options
    with pytest.raises(ValueError, match=message):
        rank_answers(model, *setting, **given)
