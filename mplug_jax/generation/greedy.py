"""Greedy decoding as one compiled loop over the decoder's cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug


def greedy(
    model: MPlug,
    params: Any,
    memory: Array,
    memory_mask: Array,
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    max_length: int,
) -> Array:
    """The likeliest next token, again and again, until every text has its [SEP].

    Args:
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      max_length: tokens of a text, [SEP] included.

    Returns:
      ``[B, max_length]`` int32 without the leading [CLS], padded after [SEP].
    """
    variables = {"params": params}
    batch = memory.shape[0]
    cache = model.apply(variables, memory, 1, max_length, method="init_cache")
    start = (
        jnp.int32(0),
        jnp.full((batch,), cls_id, jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.full((batch, max_length), pad_id, jnp.int32),
        cache,
    )

    def unfinished(loop: Any) -> Array:
        step, _, done, _, _ = loop
        return (step < max_length) & ~done.all()

    def extend(loop: Any) -> Any:
        step, last, done, texts, cache = loop
        logits, cache = model.apply(
            variables, last[:, None], memory_mask, cache, method="decode_step"
        )
        # [CLS] and padding never follow anything in a text.
        logits = logits[:, 0].at[:, jnp.array([cls_id, pad_id])].set(-jnp.inf)
        token = jnp.where(done, pad_id, logits.argmax(-1).astype(jnp.int32))
        texts = texts.at[:, step].set(token)
        return step + 1, token, done | (token == sep_id), texts, cache

    return jax.lax.while_loop(unfinished, extend, start)[3]
