"""A tiny model, and what it says of a next token when it reads the whole text without a cache."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax.models.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig
from mplug_jax.models.mplug import MPlug, init_params

PAD, CLS, SEP = 0, 1, 2
POSITIONS = 9
VOCAB = 12
# No multiple of the numbers of beams, so that a tiled memory shows.
MEMORY = 7
CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=VOCAB,
        width=12,
        depth=1,
        heads=2,
        mlp_dim=16,
        max_positions=POSITIONS,
        dropout=0.1,
        attention_dropout=0.0,
    ),
    fusion=FusionConfig(depth=2, schedule="connected"),
    decoder=DecoderConfig(depth=2),
)


@pytest.fixture(scope="session")
def ids_of():
    """The special ids as keyword arguments."""
    return {"cls_id": CLS, "sep_id": SEP, "pad_id": PAD}


@pytest.fixture(scope="session")
def model():
    return MPlug(CONFIG)


@functools.lru_cache
def _decoder_shapes():
    shapes = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
    return nn.meta.unbox(shapes["decoder"])


@pytest.fixture(scope="session")
def make_params():
    """(seed, logit biases by token) -> parameters that decoding needs, of any value."""

    def make(seed, **biases):
        rng = np.random.default_rng(seed)

        def fill(path, leaf):
            mean = 1.0 if path[-1].key == "scale" else 0.0
            spread = {"scale": 0.2, "bias": 0.1, "kernel": 0.5}.get(path[-1].key, 0.5)
            return (mean + spread * rng.normal(size=leaf.shape)).astype(np.float32)

        decoder = jax.tree_util.tree_map_with_path(fill, _decoder_shapes())
        for token, bias in biases.items():
            decoder["head"]["bias"][{"pad": PAD, "cls": CLS, "sep": SEP}[token]] = bias
        # The temperature has no part in decoding, but the model wants to see it.
        return {"decoder": decoder, "temperature": np.float32(1)}

    return make


@pytest.fixture(scope="session")
def make_memory():
    """(seed, rows) -> memory and mask."""

    def make(seed, rows):
        rng = np.random.default_rng(seed)
        memory = rng.normal(size=(rows, MEMORY, CONFIG.text.width)).astype(np.float32)
        mask = rng.random((rows, MEMORY)) < 0.7
        mask[:, 0] = True
        return memory, mask

    return make


@pytest.fixture(scope="session")
def reader(model):
    """(params, memory [M, D], mask [M]) -> a function of a text [CLS] ... to log p ``[vocab]``.

    One picture, one text, read from its beginning each time.
    """
    logits_of = jax.jit(functools.partial(model.apply, method="decode"))

    def read(params, memory, mask):
        @functools.cache
        def log_probs(text):
            ids = np.full((1, POSITIONS), PAD)
            ids[0, : len(text)] = text
            logits = logits_of({"params": params}, ids, memory[None], mask[None])
            logits = np.asarray(logits[0, len(text) - 1], np.float64)
            return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

        return log_probs

    return read
