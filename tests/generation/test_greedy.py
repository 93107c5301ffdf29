"""Greedy decoding against a loop that keeps no cache."""

import functools

import jax
import numpy as np
import pytest

from mplug_jax.generation.greedy import greedy

MAX_LENGTH = 7
ROWS = 6


@pytest.fixture(scope="module")
def setting(make_params, make_memory):
    """(parameters, memory, mask): tokens of any kind are likely, [CLS] and padding most."""
    return make_params(2, pad=50, cls=50, sep=2.5), *make_memory(1, ROWS)


@pytest.fixture(scope="module")
def decode(model, ids_of):
    return jax.jit(functools.partial(greedy, model, max_length=MAX_LENGTH, **ids_of))


def naive(reader, ids_of, params, memory, mask, prompt=(), min_length=0, allowed=None):
    """One row at a time; the whole text is read again for each token."""
    cls, sep, pad = ids_of["cls_id"], ids_of["sep_id"], ids_of["pad_id"]
    texts = []
    for row in range(len(memory)):
        log_probs, text = reader(params, memory[row], mask[row]), ()
        while len(text) < MAX_LENGTH and sep not in text:
            scores = log_probs((prompt or (cls,)) + text).copy()
            scores[[pad, cls] + [sep] * (len(text) < min_length)] = -np.inf
            if allowed is not None:
                scores[~allowed[len(text)]] = -np.inf
            text += (int(scores.argmax()),)
        texts.append(text + (pad,) * (MAX_LENGTH - len(text)))
    return np.array(texts)


def test_greedy_is_the_uncached_loop_and_pads_after_sep(setting, decode, reader, ids_of):
    want = naive(reader, ids_of, *setting)
    lengths = {int(np.count_nonzero(text)) for text in want}
    # The random decoder must show every case: texts that end early, and one that never does.
    assert len(lengths) > 2 and any(ids_of["sep_id"] not in text for text in want)
    got = decode(*setting)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


def test_greedy_continues_a_prompt_within_the_allowed_tokens(setting, reader, model, ids_of):
    rng = np.random.default_rng(4)
    allowed = rng.random((MAX_LENGTH, model.config.text.vocab_size)) < 0.5
    # The last token is no [SEP] either way.
    allowed[:, 5], allowed[:, ids_of["sep_id"]] = True, True
    options = {"min_length": 3, "allowed": allowed}
    prompt = (ids_of["cls_id"], 7, 4)
    got = jax.jit(
        functools.partial(
            greedy, model, max_length=MAX_LENGTH, prompt_ids=np.array(prompt), **options, **ids_of
        )
    )(*setting)
    want = naive(reader, ids_of, *setting, prompt, **options)
    assert np.any(want != naive(reader, ids_of, *setting, prompt, min_length=3))
    np.testing.assert_array_equal(got, want)


def test_greedy_does_not_see_masked_memory(setting, decode):
    params, memory, mask = setting
    hidden = np.where(mask[..., None], memory, 9.0).astype(np.float32)
    np.testing.assert_array_equal(decode(params, hidden, mask), decode(*setting))
    everything = decode(params, hidden, np.ones_like(mask))
    assert np.any(everything != decode(*setting))


def test_a_text_that_ends_at_once_is_sep_alone(setting, make_params, decode, ids_of):
    _, memory, mask = setting
    got = decode(make_params(0, sep=1000), memory, mask)
    want = [[ids_of["sep_id"]] + [ids_of["pad_id"]] * (MAX_LENGTH - 1)] * ROWS
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": np.ones((2, 3), int)}, r"\(2, 3\) fit no batch of 6"),
        ({"prompt_ids": np.ones(0, int)}, r"\(6, 0\) fit no batch"),
        ({"prompt_ids": np.ones(4, int)}, "10 tokens to read do not fit the 9 positions"),
        ({"allowed": np.ones((3, 12), bool)}, r"allowed has shape \(3, 12\).*\[7, 12\]"),
        ({"min_length": 7}, "min_length 7 must be .* below max_length 7"),
    ],
)
def test_mistakes_are_told(setting, model, ids_of, options, message):
    with pytest.raises(ValueError, match=message):
        greedy(model, *setting, max_length=MAX_LENGTH, **options, **ids_of)
