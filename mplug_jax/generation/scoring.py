"""The log-likelihood of given texts, with gradient: one teacher-forced pass of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mplug_jax.generation.stepping import prompt_rows
from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug
from mplug_jax.objectives.token_losses import token_losses


def sequence_log_probs(
    model: MPlug,
    params: Any,
    ids: Array,
    mask: Array,
    memory: Array,
    memory_mask: Array,
    *,
    cls_id: int,
    prompt_ids: Array | None = None,
    rngs: Mapping[str, Array] | None = None,
) -> Array:
    """log p of each token of texts such as a search or sampling has found.

    Args:
      ids: ``[B, K, T]`` int, K texts a picture without their prompt; ``mask [B, K, T]`` is True on
        their tokens, what follows a [SEP] included if it is to count.
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      prompt_ids: ``[P]`` or ``[B, P]`` with its leading [CLS]; None is [CLS] alone.
      rngs: ``{'dropout': key}`` to score under dropout.

    Returns:
      ``[B, K, T]`` float32, 0 where ``mask`` is False. Divided by ``length_penalty``, the sum over
      the last axis is the score of a beam search; its gradient is that of the search.

    Raises:
      ValueError: a prompt of the wrong shape.
    """
    rows, count, length = ids.shape
    prompt = jnp.repeat(prompt_rows(prompt_ids, cls_id, rows), count, axis=0)
    # Any token will do on padding: nothing that counts comes after it.
    ids = jnp.where(mask, ids, 0)
    read = jnp.concatenate([prompt, ids.reshape(-1, length)[:, :-1]], axis=1)
    logits = model.apply({"params": params}, read, memory, memory_mask, rngs=rngs, method="decode")
    logits = logits[:, prompt.shape[1] - 1 :].reshape(rows, count, length, -1)
    return -token_losses(logits, ids, mask)
