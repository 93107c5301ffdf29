"""Flax modules of mPLUG: image encoder, text encoder, fusion network, decoder and their wiring."""

from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    preset,
)
from mplug_jax.models.mplug import MPlug

__all__ = [
    "DecoderConfig",
    "FusionConfig",
    "MPlug",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "preset",
]
