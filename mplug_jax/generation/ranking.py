"""Ranking a list of answers by the decoder's likelihood."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax.generation.stepping import check_positions
from mplug_jax.models.decoder import DecoderCache
from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug
from mplug_jax.objectives.token_losses import cross_entropy

SCORES = ("likelihood", "official")


def rank_answers(
    model: MPlug,
    params: Any,
    memory: Array,
    memory_mask: Array,
    answer_ids: Array,
    answer_mask: Array,
    *,
    k: int,
    score: str = "likelihood",
    chunk: int = 16,
) -> tuple[Array, Array]:
    """The k answers whose first token is likeliest, ranked by the likelihood of the whole.

    Args:
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      answer_ids: ``[A, L]`` int32, [CLS] answer [SEP], padded, with mask ``[A, L]``; all begin with
        the same token.
      k: answers that are scored, at most A; with k = A the ranking is exact.
      score: 'likelihood' is the log-likelihood of the answer; 'official' counts the first token
        twice, as the released code does.
      chunk: answers of each picture scored at once; the logits take B x chunk x L x vocab floats.

    Returns:
      indices ``[B, k]`` into the answers, likeliest first, and the softmax ``[B, k]`` of the scores
      over the k.

    Raises:
      ValueError: an unknown score; k not in 1..A; answers too short or too long to be read.
    """
    if score not in SCORES:
        raise ValueError(f"Answer score {score!r} is unknown; choose one of: {', '.join(SCORES)}.")
    count, length = answer_ids.shape
    if not 1 <= k <= count:
        raise ValueError(f"k={k} answers cannot be ranked of a list of {count}.")
    if length < 3:
        raise ValueError(f"Answers are [CLS] answer [SEP], 3 tokens or more; these have {length}.")
    check_positions(model, length - 1)
    variables = {"params": params}
    batch = memory.shape[0]
    cache = model.apply(variables, memory, 1, length - 1, method="init_cache")
    start = jnp.broadcast_to(answer_ids[:1, :1], (batch, 1))
    logits, cache = model.apply(variables, start, memory_mask, cache, method="decode_step")
    # Every answer's first token is judged by these logits, so the whole list costs one step.
    first = jax.nn.log_softmax(logits[:, 0])[:, answer_ids[:, 1]]
    first, chosen = jax.lax.top_k(first, k)

    def rest(cache: DecoderCache, index: Array) -> Array:
        """log p ``[B, chunk]`` of the tokens after the first of answers ``index [B, chunk]``."""
        ids, mask = (x[index.reshape(-1)] for x in (answer_ids, answer_mask))
        logits, _ = model.apply(
            variables, ids[:, 1:-1], memory_mask, cache.fork(index.shape[1]), method="decode_step"
        )
        losses = jnp.where(mask[:, 2:], cross_entropy(logits, ids[:, 2:]), 0.0)
        return -losses.sum(axis=-1).reshape(index.shape)

    chunk = min(chunk, k)
    parts = -(-k // chunk)
    padded = jnp.pad(chosen, ((0, 0), (0, parts * chunk - k)))
    pieces = padded.reshape(batch, parts, chunk).swapaxes(0, 1)
    likelihoods = jax.lax.map(lambda index: rest(cache, index), pieces)
    likelihoods = likelihoods.swapaxes(0, 1).reshape(batch, -1)[:, :k]
    scores = likelihoods + (2 * first if score == "official" else first)
    scores, order = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(chosen, order, axis=1), jax.nn.softmax(scores)
