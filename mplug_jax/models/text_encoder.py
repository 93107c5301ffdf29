"""BERT text encoder: embeddings and a stack of bidirectional layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mplug_jax.models.config import TextConfig
from mplug_jax.models.layers import (
    MLP,
    Array,
    Attention,
    Residual,
    TextEmbeddings,
    layer_norm,
    layer_stack,
)


def attention(config: TextConfig, dtype: Any, name: str | None, cross: bool = False) -> Attention:
    """An attention sub-layer of BERT's shape; ``cross``: over another stream."""
    return Attention(
        config.width,
        config.heads,
        config.attention_dropout,
        config.init_std,
        dtype,
        config.cross_gain if cross else 1.0,
        config.qk_norm,
        name=name,
    )


def residual(config: TextConfig, dtype: Any, name: str) -> Residual:
    """The residual connection around one sub-layer, in the configured order."""
    return Residual(config.norm, config.ln_eps, config.dropout, dtype, name=name)


def mlp(config: TextConfig, dtype: Any, name: str = "mlp") -> MLP:
    """The feed-forward sub-layer."""
    return MLP(config.width, config.mlp_dim, "gelu", config.init_std, dtype, name=name)


class TextBlock(nn.Module):
    """Self-attention and feed-forward."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        attend = attention(self.config, self.dtype, "attention")
        x = residual(self.config, self.dtype, "after_attention")(x, lambda y: attend(y, y, mask))
        x = residual(self.config, self.dtype, "after_mlp")(x, mlp(self.config, self.dtype))
        self.sow("intermediates", "output", x)
        return x, None


def embeddings(config: TextConfig, dtype: Any) -> TextEmbeddings:
    """Embedding tables of BERT's shape."""
    return TextEmbeddings(
        config.vocab_size,
        config.width,
        config.max_positions,
        config.type_vocab_size,
        config.ln_eps,
        config.dropout,
        config.init_std,
        dtype,
    )


class TextEncoder(nn.Module):
    """``ids [B, L]`` and ``mask [B, L]`` (True = token) to ``[B, L, D]``."""

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self) -> None:
        self.embeddings = embeddings(self.config, self.dtype)
        blocks = layer_stack(
            TextBlock,
            self.config.depth,
            self.remat,
            self.scan_unroll,
            {"__call__": (nn.broadcast,)},
        )
        self.blocks = blocks(self.config, self.dtype)
        if self.config.norm == "pre":
            self.final_norm = layer_norm(self.config.ln_eps)

    def __call__(self, ids: Array, mask: Array) -> Array:
        x = self.embeddings(ids)
        self.sow("intermediates", "embedded", x)
        x, _ = self.blocks(x, mask[:, None, None, :])
        if self.config.norm == "pre":
            x = self.final_norm(x).astype(self.dtype)
        return x
