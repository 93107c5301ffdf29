"""Causal decoder with cross-attention, tied LM head and a key-value cache.

Without a cache it reads a whole target (teacher forcing); with one it reads the next tokens of
each hypothesis. Both run the same blocks.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mplug_jax.models.config import DecoderConfig, TextConfig
from mplug_jax.models.layers import Array, KeysValues, LMHead, layer_norm, layer_stack
from mplug_jax.models.text_encoder import attention, embeddings, mlp, residual


@flax.struct.dataclass
class DecoderCache:
    """Keys and values of a decoding run.

    Attributes:
      self_keys, self_values: ``[layers, N, heads, T_max, head_dim]``; positions from ``length``
        on are unused.
      cross_keys, cross_values: ``[layers, B, heads, M, head_dim]``, N a multiple of B: the
        hypotheses of one picture share them.
      length: int32 scalar, tokens read so far.
    """

    self_keys: Array
    self_values: Array
    cross_keys: Array
    cross_values: Array
    length: Array

    def reorder(self, index: Array) -> DecoderCache:
        """Keeps hypotheses ``index [B, N/B]`` of each row (the survivors of a beam step).

        Hypotheses never leave their row, so a batch sharded over devices needs no communication.
        """
        rows, count = index.shape

        def pick(x: Array) -> Array:
            grouped = x.reshape(x.shape[0], rows, count, *x.shape[2:])
            chosen = jnp.take_along_axis(grouped, index[None, :, :, None, None, None], axis=2)
            return chosen.reshape(x.shape)

        return self.replace(self_keys=pick(self.self_keys), self_values=pick(self.self_values))

    def fork(self, copies: int) -> DecoderCache:
        """Every hypothesis ``copies`` times, as neighbours; the cross keys stay as they are."""
        return self.replace(
            self_keys=jnp.repeat(self.self_keys, copies, axis=1),
            self_values=jnp.repeat(self.self_values, copies, axis=1),
        )


class DecoderBlock(nn.Module):
    """Masked self-attention, cross-attention, feed-forward."""

    config: TextConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = attention(self.config, self.dtype, None)
        self.cross_attention = attention(self.config, self.dtype, None, cross=True)
        self.mlp = mlp(self.config, self.dtype, None)
        self.after_attention = residual(self.config, self.dtype, None)
        self.after_cross_attention = residual(self.config, self.dtype, None)
        self.after_mlp = residual(self.config, self.dtype, None)

    def cross_keys_values(self, carry: None, memory: Array) -> tuple[None, KeysValues]:
        """Keys and values of the memory for this layer."""
        return carry, self.cross_attention.keys_values(memory)

    def __call__(
        self,
        x: Array,
        past: KeysValues | None,
        cross: KeysValues | None,
        memory: Array | None,
        start: Array | int,
        mask: Array,
        memory_mask: Array,
    ) -> tuple[Array, KeysValues | None]:
        """One layer; with ``past``, the new keys and values are written from position ``start``."""
        keys_values = written = None
        if cross is None:
            cross = self.cross_attention.keys_values(memory)

        def self_attention(y: Array) -> Array:
            nonlocal keys_values, written
            keys_values = self.attention.keys_values(y)
            if past is not None:
                keys_values = written = tuple(
                    jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, start, 0))
                    for old, new in zip(past, keys_values, strict=True)
                )
            return self.attention.attend(y, keys_values, mask)

        x = self.after_attention(x, self_attention)
        x = self.after_cross_attention(
            x, lambda y: self.cross_attention.attend(y, cross, memory_mask)
        )
        x = self.after_mlp(x, self.mlp)
        return x, written


class Decoder(nn.Module):
    """Next-token logits of ``ids`` given ``memory``, whole or step by step."""

    config: DecoderConfig
    text: TextConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self) -> None:
        t = self.text
        self.embeddings = embeddings(t, self.dtype)
        broadcast = nn.broadcast
        blocks = layer_stack(
            DecoderBlock,
            self.config.depth,
            self.remat,
            self.scan_unroll,
            {
                "__call__": (0, 0, broadcast, broadcast, broadcast, broadcast),
                "cross_keys_values": (broadcast,),
            },
        )
        self.blocks = blocks(t, self.dtype)
        if t.norm == "pre":
            self.final_norm = layer_norm(t.ln_eps)
        self.head = LMHead(t.vocab_size, t.width, t.ln_eps, t.init_std, self.dtype)

    def init_cache(self, memory: Array, hypotheses: int, max_length: int) -> DecoderCache:
        """An empty cache for ``hypotheses`` texts a row of ``memory [B, M, D]``."""
        t = self.text
        cross_keys, cross_values = self.blocks.cross_keys_values(None, memory)[1]
        rows = memory.shape[0] * hypotheses
        shape = (self.config.depth, rows, t.heads, max_length, t.width // t.heads)
        empty = jnp.zeros(shape, self.dtype)
        return DecoderCache(empty, empty, cross_keys, cross_values, jnp.int32(0))

    def decode_step(
        self, ids: Array, memory_mask: Array, cache: DecoderCache
    ) -> tuple[Array, DecoderCache]:
        """Reads ``ids [N, T]`` after what the cache holds.

        Args:
          memory_mask: ``[B, M]`` bool.

        Returns:
          logits ``[N, T, vocab]`` and the cache with T more tokens. Reading past the cache's
          ``max_length`` is an error of the caller that cannot be seen inside a compiled loop.
        """
        steps = jnp.arange(ids.shape[1])
        slots = jnp.arange(cache.self_keys.shape[3])
        mask = slots[None, :] <= cache.length + steps[:, None]
        x, (self_keys, self_values) = self.blocks(
            self.embeddings(ids, cache.length),
            (cache.self_keys, cache.self_values),
            (cache.cross_keys, cache.cross_values),
            None,
            cache.length,
            mask[None, None],
            memory_mask[:, None, None, :],
        )
        cache = cache.replace(
            self_keys=self_keys, self_values=self_values, length=cache.length + ids.shape[1]
        )
        return self._logits(x), cache

    def __call__(
        self, ids: Array, memory: Array, memory_mask: Array, mask: Array | None = None
    ) -> Array:
        """Teacher-forced logits ``[N, T, vocab]`` of ``ids [N, T]``.

        Args:
          memory: ``[B, M, D]``, N a multiple of B (N/B consecutive texts share a row).
          memory_mask: ``[B, M]`` bool.
          mask: ``[N, T]`` bool, the real tokens, or None: padding comes last, where the causal mask
            hides it from every real token. The official code masks it from other padding, too.
        """
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]
        if mask is not None:
            causal &= mask[:, None, None, :]
        x, _ = self.blocks(
            self.embeddings(ids), None, None, memory, 0, causal, memory_mask[:, None, None, :]
        )
        return self._logits(x)

    def _logits(self, x: Array) -> Array:
        if self.text.norm == "pre":
            x = self.final_norm(x).astype(self.dtype)
        return self.head(x, self.embeddings.word.embedding)
