"""Vision transformer: CLIP's (facts section 1; official ``models/clip/model.py``) and DINOv2's."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.models.axes import constrain_rows
from mplug_jax.models.config import VisionConfig
from mplug_jax.models.layers import (
    MLP,
    Array,
    Attention,
    kernel_init,
    layer_norm,
    layer_stack,
    zeros_init,
)


def normalise(image: Array, config: VisionConfig) -> Array:
    """uint8 pictures to normalised float32; float input is taken as normalised already."""
    if not jnp.issubdtype(image.dtype, jnp.integer):
        return image
    mean, std = jnp.asarray(config.image_mean), jnp.asarray(config.image_std)
    return (image.astype(jnp.float32) / 255.0 - mean) / std


def resize_positions(table: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Position embeddings of one patch grid, resampled for another.

    Bilinear without antialiasing and with half-pixel centres (``align_corners=False``), the class
    token's row kept, as the official ``resize_pos_embed``.

    Args:
      table: ``[1 + old_rows * old_columns, D]``, the class token first.

    Returns:
      ``[1 + new_rows * new_columns, D]``.
    """
    if old == new:
        return table
    width = table.shape[-1]
    grid = table[1:].reshape(*old, width)
    grid = jax.image.resize(grid, (*new, width), "bilinear", antialias=False)
    return jnp.concatenate([table[:1], grid.reshape(-1, width)])


class LayerScale(nn.Module):
    """One learned factor a channel on a residual branch (DINOv2; Touvron et al. 2021, CaiT)."""

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.initial), ("embed",))
        return x * self.param("scale", init, (x.shape[-1],)).astype(x.dtype)


class ViTBlock(nn.Module):
    """Pre-LN transformer block."""

    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        c = self.config
        attention = Attention(
            c.width,
            c.heads,
            c.attention_dropout,
            c.width**-0.5,
            self.dtype,
            qk_norm=c.qk_norm,
            name="attention",
        )
        mlp = MLP(c.width, c.mlp_dim, c.activation, c.width**-0.5, self.dtype, name="mlp")
        y = layer_norm(c.ln_eps, "ln_1")(x).astype(self.dtype)
        y = attention(y, y)
        x = x + (LayerScale(c.layer_scale, name="layer_scale_1")(y) if c.layer_scale else y)
        y = mlp(layer_norm(c.ln_eps, "ln_2")(x).astype(self.dtype))
        x = x + (LayerScale(c.layer_scale, name="layer_scale_2")(y) if c.layer_scale else y)
        self.sow("intermediates", "output", x)
        return x, None


class ConvStem(nn.Module):
    """Ladder of 3x3 stride-2 convolutions down to the patch grid, then a 1x1 projection."""

    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        steps = self.config.patch_size[0].bit_length() - 1
        x = image
        for i in range(steps):
            channels = max(self.config.width >> (steps - 1 - i), 16)
            x = nn.Conv(
                channels,
                (3, 3),
                strides=(2, 2),
                dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.he_normal(), (None, None, "patch", "embed")
                ),
                bias_init=zeros_init("embed"),
                name=f"conv_{i}",
            )(x)
            # No norm here: it would blow the noise of a plain background up to full size.
            x = jax.nn.gelu(constrain_rows(x))
        init = kernel_init(self.config.width**-0.5, "patch", "embed")
        return nn.Dense(
            self.config.width,
            dtype=self.dtype,
            kernel_init=init,
            bias_init=zeros_init("embed"),
            name="project",
        )(x)


class ViT(nn.Module):
    """Image encoder: ``[B, H, W, 3]`` (uint8, or normalised float) to tokens ``[B, 1 + P, D]``.

    A picture whose patch grid is not the configured one gets resampled position embeddings.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    @nn.compact
    def __call__(self, image: Array) -> Array:
        c = self.config
        std = c.width**-0.5
        x = normalise(image, c).astype(self.dtype)
        if x.shape[1] % c.patch_size[0] or x.shape[2] % c.patch_size[1]:
            raise ValueError(f"A picture of {x.shape[1:3]} px has no whole {c.patch_size} patches.")
        if c.stem == "conv":
            x = ConvStem(c, self.dtype, name="stem")(x)
        else:
            x = nn.Conv(
                c.width,
                c.patch_size,
                strides=c.patch_size,
                padding="VALID",
                use_bias=c.patch_bias,
                dtype=self.dtype,
                kernel_init=kernel_init(std, None, None, "patch", "embed"),
                bias_init=zeros_init("embed"),
                name="patch_embedding",
            )(x)
        grid = x.shape[1:3]
        x = constrain_rows(x.reshape(x.shape[0], -1, c.width))
        cls = self.param("class_embedding", kernel_init(std, "embed"), (c.width,))
        # The conv stem's tokens deviate by 1 and more: positions of CLIP's scale drown in them.
        positions = self.param(
            "position_embedding",
            kernel_init(1.0 if c.stem == "conv" else std, "position", "embed"),
            (1 + c.grid[0] * c.grid[1], c.width),
        )
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, c.width))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + resize_positions(positions, c.grid, grid).astype(self.dtype)
        if c.pre_norm:
            x = layer_norm(c.ln_eps, "ln_pre")(x).astype(self.dtype)
        self.sow("intermediates", "embedded", x)
        blocks = layer_stack(ViTBlock, c.depth, self.remat, self.scan_unroll, {"__call__": ()})
        x, _ = blocks(c, self.dtype, name="blocks")(x)
        return layer_norm(c.ln_eps, "ln_post")(x).astype(self.dtype)
