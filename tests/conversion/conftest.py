"""A small official model with random weights, and its state dict with the dead weights in it."""

import functools
import types

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from mplug_jax.conversion.official import state_dict
from mplug_jax.conversion.transfer import parameter_shapes
from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

# Sizes that differ, so that a mixed-up axis shows. Fusion: cross, cross, connected.
SMALL = ModelConfig(
    vision=VisionConfig(
        image_size=(12, 12), patch_size=(4, 4), width=12, depth=2, heads=3, mlp_dim=20
    ),
    text=TextConfig(vocab_size=29, width=16, depth=2, heads=2, mlp_dim=24, max_positions=11),
    fusion=FusionConfig(depth=3, schedule="official", stride=2),
    decoder=DecoderConfig(depth=2),
    embed_dim=5,
)
LAYER = "fusion_encoder.encoder.layer."


@functools.lru_cache
def random_params(config: ModelConfig):
    rng = np.random.default_rng(3)
    shapes = parameter_shapes(config)
    arrays = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return unflatten_dict(arrays, sep="/")


def released(config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict as the official models save it: dead weights, constants, queues, twins."""
    state = state_dict(random_params(config), config)
    cross = {n: a for n, a in state.items() if n.startswith(f"{LAYER}9.")}
    for name, array in cross.items():
        for i in range(9):
            state[name.replace(".9.", f".{i}.")] = array + i
        if ".crossattention." in name:
            state[name.replace(".9.", ".11.")] = array - 1
    ones = np.ones((2, 3), np.float32)
    for name in (
        "visual_encoder.positional_embedding",
        "visual_encoder.text_projection",
        "visual_encoder.logit_scale",
        "visual_encoder.token_embedding.weight",
        "visual_encoder.ln_final.bias",
        "visual_encoder.transformer.resblocks.0.ln_1.weight",
        "visual_encoder.visual.proj",
        "text_encoder.embeddings.position_ids",
        "fusion_encoder.embeddings.word_embeddings.weight",
        "image_queue",
        "idx_queue",
        "queue_ptr",
        "text_encoder_m.embeddings.word_embeddings.weight",
        "vision_proj_m.weight",
    ):
        state[name] = ones
    return state


@pytest.fixture
def small():
    """config, params, state (as saved), live (names that the model reads), given (heads)."""
    params = random_params(SMALL)
    return types.SimpleNamespace(
        config=SMALL,
        params=params,
        state=released(SMALL),
        live=state_dict(params, SMALL),
        given={"vision_heads": 3, "text_heads": 2, "fusion_depth": 3, "fusion_stride": 2},
    )
