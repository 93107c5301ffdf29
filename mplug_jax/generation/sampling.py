"""Random texts: temperature, top-k and nucleus sampling as one compiled loop over the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax.generation.stepping import (
    Texts,
    check_lengths,
    next_logits,
    prompt_rows,
    read_prompt,
    write_texts,
)
from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Settings of sampling.

    Attributes:
      samples: texts drawn a picture.
      max_length: tokens generated at most, [SEP] included, the prompt not.
      min_length: [SEP] is not among the first ``min_length`` tokens.
      temperature: logits are divided by it.
      top_k: only the likeliest so many tokens are drawn; None: any.
      top_p: of those, only the fewest likeliest whose probabilities reach ``top_p`` together
        (Holtzman et al. 2020, "The curious case of neural text degeneration").
    """

    samples: int = 1
    max_length: int = 25
    min_length: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 0.9

    def __post_init__(self) -> None:
        check_lengths(self.min_length, self.max_length)
        if self.samples < 1:
            raise ValueError(f"Sampling draws at least 1 text a picture, got {self.samples}.")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature {self.temperature} must be above 0; its limit at 0 is greedy."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or None for no limit.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1.")


def sample(
    model: MPlug,
    params: Any,
    memory: Array,
    memory_mask: Array,
    config: SampleConfig,
    rng: Array,
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    prompt_ids: Array | None = None,
    allowed: Array | None = None,
    row_ids: Array | None = None,
) -> Texts:
    """Texts drawn from the decoder, several a picture.

    A text depends on the key, its picture's row id and its number among the picture's samples, not
    on what else is in the batch. The keys and values of ``memory`` are computed once a picture.

    Args:
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      rng: a key.
      prompt_ids, allowed: see ``greedy``.
      row_ids: ``[B]`` int32 that tell pictures apart, such as their places in a data set; None
        takes the places in the batch.

    Returns:
      Texts ``[B, samples, ...]``; ``log_probs`` are those of the model at temperature 1 with every
      token of ``allowed`` in reach, whatever was cut off to draw.

    Raises:
      ValueError: a prompt or ``allowed`` of the wrong shape; too few positions in the model.
    """
    rows = memory.shape[0]
    prompt = prompt_rows(prompt_ids, cls_id, rows)
    last, cache = read_prompt(model, params, memory, memory_mask, prompt, config.max_length)
    row_ids = jnp.arange(rows) if row_ids is None else row_ids
    fold_in = jax.vmap(jax.random.fold_in)
    by_row = fold_in(jnp.repeat(rng[None], rows), jnp.asarray(row_ids))
    keys = fold_in(jnp.repeat(by_row, config.samples), jnp.tile(jnp.arange(config.samples), rows))

    def choose(logits: Array, step: Array) -> Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(_draw, (0, 0, None))(step_keys, logits, config)

    texts = write_texts(
        next_logits(model, params, memory_mask, config.max_length, allowed),
        choose,
        jnp.repeat(last, config.samples),
        cache.fork(config.samples),
        cls_id=cls_id,
        sep_id=sep_id,
        pad_id=pad_id,
        max_length=config.max_length,
        min_length=config.min_length,
    )

    def by_picture(x: Array) -> Array:
        return x.reshape(rows, config.samples, *x.shape[1:])

    return Texts(*map(by_picture, (texts.ids, texts.log_probs, texts.lengths)), texts.steps)


def _draw(key: Array, logits: Array, config: SampleConfig) -> Array:
    """A token, int32 scalar, of ``logits [vocab]``."""
    logits = logits / config.temperature
    if config.top_k is None and config.top_p == 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    vocab = logits.shape[-1]
    logits, tokens = jax.lax.top_k(logits, min(config.top_k or vocab, vocab))
    if config.top_p < 1:
        probs = jax.nn.softmax(logits)
        # A token stays if those before it do not reach top_p: the first one always does.
        logits = jnp.where(jnp.cumsum(probs) - probs < config.top_p, logits, -jnp.inf)
    return tokens[jax.random.categorical(key, logits)].astype(jnp.int32)
