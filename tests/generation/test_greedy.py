"""Greedy decoding against a loop that keeps no cache."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax.generation.greedy import greedy
from mplug_jax.models.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig
from mplug_jax.models.mplug import MPlug, init_params

PAD, CLS, SEP = 0, 2, 3
MAX_LENGTH = 7
ROWS = 6
CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=23, width=12, depth=1, heads=2, mlp_dim=16, max_positions=MAX_LENGTH
    ),
    fusion=FusionConfig(depth=2, schedule="connected"),
    decoder=DecoderConfig(depth=2),
)


@pytest.fixture(scope="module")
def setting():
    """(decoder parameters, memory, mask): tokens of any kind are likely, [CLS] and padding most."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        spread = {"scale": 0.2, "bias": 0.1, "kernel": 0.6}.get(path[-1].key, 1.0)
        return (mean + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    decoder = jax.tree_util.tree_map_with_path(fill, nn.meta.unbox(shapes["decoder"]))
    decoder["head"]["bias"][[PAD, CLS]] = 50
    decoder["head"]["bias"][SEP] = 3
    memory = rng.normal(size=(ROWS, 4, CONFIG.text.width)).astype(np.float32)
    mask = rng.random((ROWS, 4)) < 0.7
    mask[:, 0] = True
    # The temperature has no part in decoding, but the model wants to see it.
    return {"decoder": decoder, "temperature": np.float32(1)}, memory, mask


@pytest.fixture(scope="module")
def decode():
    return jax.jit(
        functools.partial(
            greedy, MPlug(CONFIG), cls_id=CLS, sep_id=SEP, pad_id=PAD, max_length=MAX_LENGTH
        )
    )


def naive(params, memory, mask):
    """One row at a time; the whole text is read again for each token."""
    logits_of = jax.jit(functools.partial(MPlug(CONFIG).apply, method="decode"))
    texts = []
    for row in range(len(memory)):
        ids, text = np.full((1, MAX_LENGTH), PAD), []
        ids[0, 0] = CLS
        while len(text) < MAX_LENGTH and SEP not in text:
            logits = logits_of({"params": params}, ids, memory[[row]], mask[[row]])
            scores = np.array(logits[0, len(text)])
            scores[[PAD, CLS]] = -np.inf
            text.append(int(scores.argmax()))
            if len(text) < MAX_LENGTH:
                ids[0, len(text)] = text[-1]
        texts.append(text)
    return texts


def test_greedy_is_the_uncached_loop_and_pads_after_sep(setting, decode):
    want = naive(*setting)
    lengths = {len(text) for text in want}
    # The random decoder must show every case: texts that end early, and one that never does.
    assert len(lengths) > 2 and any(SEP not in text for text in want)
    got = decode(*setting)
    assert got.shape == (ROWS, MAX_LENGTH) and got.dtype == np.int32
    padded = [text + [PAD] * (MAX_LENGTH - len(text)) for text in want]
    np.testing.assert_array_equal(got, padded)
    assert not np.any(got == CLS)


def test_greedy_does_not_see_masked_memory(setting, decode):
    params, memory, mask = setting
    hidden = np.where(mask[..., None], memory, 9.0).astype(np.float32)
    np.testing.assert_array_equal(decode(params, hidden, mask), decode(*setting))
    everything = decode(params, hidden, np.ones_like(mask))
    assert np.any(everything != decode(*setting))


def test_a_text_that_ends_at_once_is_sep_alone(setting, decode):
    params, memory, mask = setting
    head = params["decoder"]["head"]
    bias = np.where(np.arange(len(head["bias"])) == SEP, 1000, head["bias"])
    eager = params | {"decoder": params["decoder"] | {"head": head | {"bias": bias}}}
    got = decode(eager, memory, mask)
    np.testing.assert_array_equal(got, [[SEP] + [PAD] * (MAX_LENGTH - 1)] * ROWS)
