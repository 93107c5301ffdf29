"""What every decoding procedure does: read a prompt, then one token of each hypothesis a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mplug_jax.models.decoder import DecoderCache
from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug
from mplug_jax.objectives.token_losses import cross_entropy

# (last tokens [N], step, cache) -> (logits [N, vocab], cache)
NextLogits = Callable[[Array, Array, DecoderCache], tuple[Array, DecoderCache]]


@flax.struct.dataclass
class Texts:
    """Generated texts ``[..., max_length]``, without their prompt.

    Attributes:
      ids: int32, padded after ``lengths``.
      log_probs: float32, the model's log p of each token, 0 on padding.
      lengths: ``[...]`` int32, tokens generated, [SEP] included.
      steps: int32 scalar, tokens read of each text: the loop ends with the longest.
    """

    ids: Array
    log_probs: Array
    lengths: Array
    steps: Array

    @property
    def mask(self) -> Array:
        """True on generated tokens, ``[..., max_length]``."""
        return token_mask(self.lengths, self.ids.shape[-1])


def token_mask(lengths: Array, max_length: int) -> Array:
    """``[..., max_length]`` bool, True on the first ``lengths [...]`` places."""
    return jnp.arange(max_length) < lengths[..., None]


def check_lengths(min_length: int, max_length: int) -> None:
    """Raises ValueError unless 0 <= min_length < max_length."""
    if not 0 <= min_length < max_length:
        raise ValueError(
            f"min_length {min_length} must be at least 0 and below max_length {max_length}."
        )


def prompt_rows(prompt_ids: Array | None, cls_id: int, batch: int) -> Array:
    """The prompt of each picture, ``[B, P]``.

    Args:
      prompt_ids: ``[P]``, one for all, or ``[B, P]``, with its leading [CLS]; None is [CLS] alone.

    Raises:
      ValueError: another shape, or an empty prompt.
    """
    prompt = jnp.array([cls_id]) if prompt_ids is None else jnp.asarray(prompt_ids)
    if prompt.ndim == 1:
        prompt = jnp.broadcast_to(prompt, (batch, prompt.shape[0]))
    if prompt.ndim != 2 or prompt.shape[0] != batch or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt_ids of shape {prompt.shape} fit no batch of {batch} pictures; give [P] or "
            f"[{batch}, P] with the leading [CLS], all prompts of one length."
        )
    return prompt.astype(jnp.int32)


def check_positions(model: MPlug, length: int) -> None:
    """Raises ValueError if the decoder has no positions for ``length`` tokens to be read."""
    positions = model.config.text.max_positions
    if length > positions:
        raise ValueError(
            f"A prompt and a text that take {length} tokens to read do not fit the {positions} "
            "positions of the model; lower max_length or raise config.model.text.max_positions."
        )


def read_prompt(
    model: MPlug, params: Any, memory: Array, memory_mask: Array, prompt: Array, max_length: int
) -> tuple[Array, DecoderCache]:
    """Reads all of ``prompt [B, P]`` but its last token.

    Returns:
      that token ``[B]``, and the cache of one hypothesis a picture with room for ``max_length``
      tokens after the prompt (the last of which nobody reads).
    """
    length = prompt.shape[1] + max_length - 1
    check_positions(model, length)
    variables = {"params": params}
    cache = model.apply(variables, memory, 1, length, method="init_cache")
    if prompt.shape[1] > 1:
        _, cache = model.apply(variables, prompt[:, :-1], memory_mask, cache, method="decode_step")
    return prompt[:, -1], cache


def next_logits(
    model: MPlug, params: Any, memory_mask: Array, max_length: int, allowed: Array | None
) -> NextLogits:
    """The step of a decoding loop: ``(last [N], step, cache) -> (logits [N, vocab], cache)``.

    Args:
      allowed: bool ``[vocab]``, or ``[max_length, vocab]`` with a set of tokens for each step;
        the logits of other tokens become -inf, so that probabilities are those within the set.

    Raises:
      ValueError: ``allowed`` of another shape.
    """
    vocab = model.config.text.vocab_size
    if allowed is not None and jnp.shape(allowed) not in ((vocab,), (max_length, vocab)):
        raise ValueError(
            f"allowed has shape {jnp.shape(allowed)}; give [{vocab}] (vocabulary) or "
            f"[{max_length}, {vocab}] (max_length, vocabulary)."
        )

    def step_logits(last: Array, step: Array, cache: DecoderCache) -> tuple[Array, DecoderCache]:
        logits, cache = model.apply(
            {"params": params}, last[:, None], memory_mask, cache, method="decode_step"
        )
        logits = logits[:, 0]
        if allowed is not None:
            permitted = jnp.asarray(allowed)
            permitted = permitted if permitted.ndim == 1 else permitted[step]
            logits = jnp.where(permitted, logits, -jnp.inf)
        return logits, cache

    return step_logits


def without(scores: Array, *tokens: int, value: float = -jnp.inf) -> Array:
    """``scores [..., vocab]`` with ``value`` for these tokens; ids beyond the vocabulary pass."""
    return jnp.where(jnp.isin(jnp.arange(scores.shape[-1]), jnp.array(tokens)), value, scores)


def write_texts(
    logits_of: NextLogits,
    choose: Callable[[Array, Array], Array],
    last: Array,
    cache: DecoderCache,
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    max_length: int,
    min_length: int,
) -> Texts:
    """One token of each text a step, until all have their [SEP].

    Args:
      choose: ``(logits [N, vocab], step) -> token [N]`` int32; the logits of [CLS], of padding and
        of a [SEP] that comes too early are -inf.
      last: ``[N]``, the last tokens of the prompts, and their ``cache``.

    Raises:
      ValueError: min_length not in 0..max_length-1.
    """
    check_lengths(min_length, max_length)
    rows = last.shape[0]
    start = Texts(
        ids=jnp.full((rows, max_length), pad_id, jnp.int32),
        log_probs=jnp.zeros((rows, max_length)),
        lengths=jnp.zeros((rows,), jnp.int32),
        steps=jnp.int32(0),
    )

    def unfinished(loop: Any) -> Array:
        texts, _, done, _ = loop
        return (texts.steps < max_length) & ~done.all()

    def extend(loop: Any) -> Any:
        texts, last, done, cache = loop
        step = texts.steps
        logits, cache = logits_of(last, step, cache)
        possible = without(logits, cls_id, pad_id)
        possible = jnp.where(step < min_length, without(possible, sep_id), possible)
        token = choose(possible, step)
        log_prob = -cross_entropy(logits, token)
        texts = Texts(
            ids=texts.ids.at[:, step].set(jnp.where(done, pad_id, token)),
            log_probs=texts.log_probs.at[:, step].set(jnp.where(done, 0.0, log_prob)),
            lengths=texts.lengths + ~done,
            steps=step + 1,
        )
        return texts, token, done | (token == sep_id), cache

    return jax.lax.while_loop(unfinished, extend, (start, last, jnp.zeros((rows,), bool), cache))[0]
