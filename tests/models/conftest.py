"""A small model for every test here, and the same mathematics written again in NumPy float64."""

import functools
import math
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from mplug_jax.models.mplug import init_params

# No two sizes agree, so that a mixed-up axis shows; the picture and its patches are not square.
SMALL = ModelConfig(
    vision=VisionConfig(
        image_size=(8, 18),
        patch_size=(4, 6),
        width=12,
        depth=2,
        heads=3,
        mlp_dim=20,
        attention_dropout=0.0,
    ),
    text=TextConfig(
        vocab_size=29,
        width=16,
        depth=2,
        heads=2,
        mlp_dim=24,
        max_positions=11,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    fusion=FusionConfig(depth=2, schedule="official", stride=1),
    decoder=DecoderConfig(depth=2),
    embed_dim=5,
    temperature_range=None,
)


@functools.lru_cache
def abstract_params(config):
    """Boxed parameter shapes, traced once a config."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


@functools.lru_cache
def filled_params(config):
    """Parameters of any value: biases and norm scales count too, unlike at initialisation."""
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return {"scale": 1 + 0.2 * noise, "kernel": 0.3 * noise}.get(name, 0.5 * noise)

    return jax.tree_util.tree_map_with_path(fill, nn.meta.unbox(abstract_params(config)))


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def params_of():
    """config -> parameters (NumPy float32)."""
    return filled_params


@pytest.fixture(scope="session")
def shapes_of():
    """config -> abstract parameters, boxed with their axis names."""
    return abstract_params


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rms_norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def mlp(p, x, activation=gelu):
    return dense(p["down"], activation(dense(p["up"], x)))


def attention(p, x, memory, mask=None):
    """Row by row and head by head; mask ``[B, T or 1, S]``."""
    out = np.zeros(x.shape) + p["out"]["bias"]
    for b in range(len(x)):
        for h in range(p["query"]["kernel"].shape[1]):
            q, k, v = (
                source @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                for name, source in (("query", x[b]), ("key", memory[b]), ("value", memory[b]))
            )
            if "query_norm" in p:
                q, k = rms_norm(p["query_norm"], q), rms_norm(p["key_norm"], k)
            scores = q @ k.T / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = np.where(np.broadcast_to(mask[b], scores.shape), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b] += weights @ v @ p["out"]["kernel"][h]
    return out


def residual(p, x, sublayer, text):
    norm = functools.partial(layer_norm, p["layer_norm"], eps=text.ln_eps)
    return norm(x + sublayer(x)) if text.norm == "post" else x + sublayer(norm(x))


def layers(p, depth):
    """The slices of stacked parameters."""
    return [jax.tree.map(lambda x, i=i: x[i], p) for i in range(depth)]


def embeddings(p, ids, text):
    x = p["word"]["embedding"][ids] + p["position"]["embedding"][: ids.shape[1]]
    return layer_norm(p["layer_norm"], x + p["token_type"]["embedding"][0], text.ln_eps)


def vit(p, image, vision, positions):
    """``positions [1 + P, D]``: those of this picture's grid."""
    rows, columns = (s // q for s, q in zip(image.shape[1:3], vision.patch_size, strict=True))
    high, wide = vision.patch_size
    kernel = p["patch_embedding"]["kernel"].reshape(-1, vision.width)
    patches = [
        image[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide].reshape(len(image), -1)
        for r in range(rows)
        for c in range(columns)
    ]
    cls = np.broadcast_to(p["class_embedding"], (len(image), 1, vision.width))
    embedded = np.stack(patches, 1) @ kernel
    if vision.patch_bias:
        embedded = embedded + p["patch_embedding"]["bias"]
    x = np.concatenate([cls, embedded], axis=1) + positions
    if vision.pre_norm:
        x = layer_norm(p["ln_pre"], x, vision.ln_eps)
    activation = {"gelu": gelu, "quick_gelu": quick_gelu}[vision.activation]
    for layer in layers(p["blocks"], vision.depth):
        scales = (
            [layer[f"layer_scale_{i}"]["scale"] for i in (1, 2)] if vision.layer_scale else (1, 1)
        )
        y = layer_norm(layer["ln_1"], x, vision.ln_eps)
        x = x + scales[0] * attention(layer["attention"], y, y)
        y = layer_norm(layer["ln_2"], x, vision.ln_eps)
        x = x + scales[1] * mlp(layer["mlp"], y, activation)
    return layer_norm(p["ln_post"], x, vision.ln_eps)


def text_encoder(p, ids, mask, text):
    x = embeddings(p["embeddings"], ids, text)
    for layer in layers(p["blocks"], text.depth):
        x = _self_attention(layer, x, mask[:, None], text)
        x = residual(layer["after_mlp"], x, functools.partial(mlp, layer["mlp"]), text)
    return layer_norm(p["final_norm"], x, text.ln_eps) if text.norm == "pre" else x


def _self_attention(p, x, mask, text, prefix=""):
    def attend(y):
        return attention(p[f"{prefix}attention"], y, y, mask)

    return residual(p[f"{prefix}after_attention"], x, attend, text)


def _cross_attention(p, x, memory, mask, text, prefix=""):
    def attend(y):
        return attention(p[f"{prefix}cross_attention"], y, memory, mask)

    return residual(p[f"{prefix}after_cross_attention"], x, attend, text)


def _feed_forward(p, x, text, prefix=""):
    return residual(p[f"{prefix}after_mlp"], x, functools.partial(mlp, p[f"{prefix}mlp"]), text)


def fusion(p, image, words, mask, kinds, add_image, text):
    mask = mask[:, None]
    for i, kind in enumerate(kinds):
        layer = p[f"layer_{i}"]
        if kind == "cross":
            words = _self_attention(layer, words, mask, text)
            words = _cross_attention(layer, words, image, None, text)
            words = _feed_forward(layer, words, text)
        elif kind == "connected":
            both = np.concatenate([np.ones((len(mask), 1, image.shape[1]), bool), mask], axis=2)
            x = np.concatenate([image, words], axis=1)
            x = _feed_forward(layer, _self_attention(layer, x, both, text), text)
            new_image, words = np.split(x, [image.shape[1]], axis=1)
            image = image + new_image if add_image else new_image
        else:
            new_image = _self_attention(layer, image, None, text, "image_")
            new_image = _cross_attention(layer, new_image, words, mask, text, "image_")
            new_words = _self_attention(layer, words, mask, text, "text_")
            new_words = _cross_attention(layer, new_words, image, None, text, "text_")
            image = _feed_forward(layer, new_image, text, "image_")
            words = _feed_forward(layer, new_words, text, "text_")
    if text.norm == "pre":
        words = layer_norm(p["final_norm"], words, text.ln_eps)
        if set(kinds) != {"cross"}:
            image = layer_norm(p["final_image_norm"], image, text.ln_eps)
    return image, words


def lm_head(p, x, embedding, text):
    x = layer_norm(p["layer_norm"], gelu(dense(p["transform"], x)), text.ln_eps)
    return x @ embedding.T + p["bias"]


def decoder(p, ids, memory, memory_mask, depth, text):
    x = embeddings(p["embeddings"], ids, text)
    causal = np.tril(np.ones((1, ids.shape[1], ids.shape[1]), bool)).repeat(len(ids), axis=0)
    for layer in layers(p["blocks"], depth):
        x = _self_attention(layer, x, causal, text)
        x = _cross_attention(layer, x, memory, memory_mask[:, None], text)
        x = _feed_forward(layer, x, text)
    if text.norm == "pre":
        x = layer_norm(p["final_norm"], x, text.ln_eps)
    return lm_head(p["head"], x, p["embeddings"]["word"]["embedding"], text)


@pytest.fixture(scope="session")
def reference():
    """The functions above by name."""
    names = (
        "dense layer_norm gelu quick_gelu mlp attention residual vit text_encoder fusion decoder "
        "lm_head embeddings"
    )
    return types.SimpleNamespace(**{name: globals()[name] for name in names.split()})
