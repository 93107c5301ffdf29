"""Greedy decoding as one compiled loop over the decoder's cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mplug_jax.generation.stepping import next_logits, prompt_rows, read_prompt, write_texts
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
    min_length: int = 0,
    prompt_ids: Array | None = None,
    allowed: Array | None = None,
) -> Array:
    """The likeliest next token, again and again, until every text has its [SEP].

    Args:
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      max_length: tokens of a text, [SEP] included, the prompt not.
      min_length: [SEP] is not among the first ``min_length`` tokens.
      prompt_ids: ``[P]`` or ``[B, P]`` int32 with its leading [CLS] (None: [CLS] alone): what the
        texts continue.
      allowed: bool ``[vocab]`` or ``[max_length, vocab]``, the only tokens (of each step) that may
        be generated.

    Returns:
      ``[B, max_length]`` int32 without the prompt, padded after [SEP]. [CLS] and padding are never
      chosen: they follow nothing in a text.

    Raises:
      ValueError: a prompt or ``allowed`` of the wrong shape; too few positions in the model.
    """
    prompt = prompt_rows(prompt_ids, cls_id, memory.shape[0])
    last, cache = read_prompt(model, params, memory, memory_mask, prompt, max_length)
    texts = write_texts(
        next_logits(model, params, memory_mask, max_length, allowed),
        lambda logits, step: logits.argmax(-1).astype(jnp.int32),
        last,
        cache,
        cls_id=cls_id,
        sep_id=sep_id,
        pad_id=pad_id,
        max_length=max_length,
        min_length=min_length,
    )
    return texts.ids
