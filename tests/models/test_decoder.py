"""The decoder against NumPy, and its cache against itself without one."""

import jax
import numpy as np
import pytest

from mplug_jax.models.decoder import Decoder

IDS = np.array([[2, 9, 14, 3, 0, 0], [2, 7, 5, 11, 28, 3], [2, 3, 20, 8, 1, 6], [2, 8, 4, 4, 3, 0]])


def memories(width):
    """Two rows of memory and their mask, the first with a hidden token in the middle."""
    memory = np.random.default_rng(3).normal(size=(2, 5, width)).astype(np.float32)
    return memory, np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)


def make(config, params_of):
    module = Decoder(config.decoder, config.text)
    return module, {"params": params_of(config)["decoder"]}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_decoder_is_the_numpy_one_causal_and_blind_to_masked_memory(
    small, params_of, reference, norm
):
    config = small.replace(text={"norm": norm})
    module, variables = make(config, params_of)
    memory, mask = memories(config.text.width)
    run = jax.jit(module.apply)
    # Two texts a row of memory, as neighbours.
    got = run(variables, IDS, memory, mask)
    want = reference.decoder(
        variables["params"], IDS, memory.repeat(2, 0), mask.repeat(2, 0), 2, config.text
    )
    assert got.shape == (4, 6, config.text.vocab_size)
    np.testing.assert_allclose(got, want, atol=5e-4)

    future = IDS.copy()
    future[:, 4:] = 13
    changed = run(variables, future, memory, mask)
    np.testing.assert_array_equal(changed[:, :4], got[:, :4])
    assert np.abs(changed[:, 4:] - got[:, 4:]).max() > 0.01

    hidden = np.where(mask[..., None], memory, 9.0)
    np.testing.assert_array_equal(run(variables, IDS, hidden, mask), got)


def test_cached_logits_are_the_uncached_ones_also_after_a_reorder(small, params_of):
    module, variables = make(small.replace(text={"norm": "pre"}), params_of)
    memory, mask = memories(small.text.width)
    whole = jax.jit(module.apply)
    step = jax.jit(lambda v, ids, cache: module.apply(v, ids, mask, cache, method="decode_step"))
    cache = jax.jit(lambda v, m: module.apply(v, m, 2, IDS.shape[1], method="init_cache"))(
        variables, memory
    )
    assert cache.cross_keys.shape[1] == 2 and cache.self_keys.shape[1] == 4

    expected = whole(variables, IDS, memory, mask)
    # Two tokens at once, then one by one.
    logits, cache = step(variables, IDS[:, :2], cache)
    np.testing.assert_allclose(logits, expected[:, :2], atol=1e-5)
    logits, cache = step(variables, IDS[:, 2:3], cache)
    np.testing.assert_allclose(logits, expected[:, 2:3], atol=1e-5)

    # The first hypothesis of row 0 takes both places, those of row 1 change theirs.
    texts = np.concatenate([IDS[[0, 0, 3, 2], :3], IDS[:, 3:]], axis=1)
    expected = whole(variables, texts, memory, mask)
    cache = cache.reorder(np.array([[0, 0], [1, 0]]))
    for t in range(3, IDS.shape[1]):
        logits, cache = step(variables, texts[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)
    assert cache.length == IDS.shape[1]
