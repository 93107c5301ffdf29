"""Beam search as one compiled loop over the decoder's cache.

Two procedures share the loop and differ in what survives a step:

*standard*: a beam that emits [SEP] retires into a pool of finished texts and its place goes to
another; a picture is done when no living beam can still beat the worst text of the full pool.

*official*: that of the released mPLUG (`predictor.py`, from PreSumm). A beam that emits [SEP] is
written down and lives on, so texts may go on after their [SEP]; a picture is done when its best
beam of a step emits [SEP], and all beams of that step are written down with it.

Scores are ``log p / ((5 + tokens) / 6) ** length_penalty`` (Wu et al. 2016, eq. 14).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.generation.stepping import (
    check_lengths,
    next_logits,
    prompt_rows,
    read_prompt,
    token_mask,
    without,
)
from mplug_jax.models.decoder import DecoderCache
from mplug_jax.models.layers import Array
from mplug_jax.models.mplug import MPlug

PROCEDURES = ("standard", "official")
# The official stand-in for a forbidden [SEP]: finite, so it outranks the beams at -inf.
OFFICIAL_FORBIDDEN = -1e20


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Settings of a beam search.

    Attributes:
      beams: living hypotheses a picture.
      max_length: tokens generated at most, [SEP] included, the prompt not.
      min_length: [SEP] is not among the first ``min_length`` tokens.
      length_penalty: exponent of the penalty above; 0 ranks by log-likelihood.
      procedure: 'standard' or 'official'.
      returned: texts returned a picture, ``beams`` if None. Fewer let the standard procedure stop
        sooner, and change nothing in the texts that are returned.
    """

    beams: int = 5
    max_length: int = 25
    min_length: int = 0
    length_penalty: float = 0.6
    procedure: str = "standard"
    returned: int | None = None

    def __post_init__(self) -> None:
        if self.procedure not in PROCEDURES:
            raise ValueError(
                f"Beam procedure {self.procedure!r} is unknown; choose one of: "
                f"{', '.join(PROCEDURES)}."
            )
        if self.beams < 1:
            raise ValueError(f"Beam search needs at least 1 beam, got {self.beams}.")
        check_lengths(self.min_length, self.max_length)
        if self.length_penalty < 0:
            raise ValueError(
                f"length_penalty {self.length_penalty} is negative: the search could not tell when "
                "to stop. Use 0 to rank by log-likelihood."
            )
        if self.returned is not None and not 1 <= self.returned <= self.beams:
            raise ValueError(
                f"{self.returned} texts cannot be returned of {self.beams} beams; choose 1 to "
                f"{self.beams}."
            )

    @property
    def kept(self) -> int:
        """Texts returned a picture."""
        return self.beams if self.returned is None else self.returned


@flax.struct.dataclass
class Hypotheses:
    """Texts of each picture, best first.

    Attributes:
      ids: ``[B, returned, max_length]`` int32, without the prompt, padded after ``lengths``.
      scores: ``[B, returned]`` float32; -inf where fewer texts than asked for exist (length 0).
      lengths: ``[B, returned]`` int32, tokens generated, [SEP] included.
      steps: int32 scalar, tokens the loop has read of each beam: at most ``max_length``.
    """

    ids: Array
    scores: Array
    lengths: Array
    steps: Array

    @property
    def mask(self) -> Array:
        """True on generated tokens, ``[B, returned, max_length]``."""
        return token_mask(self.lengths, self.ids.shape[-1])


@flax.struct.dataclass
class _Search:
    """The loop's state: living beams ``[B, K, ...]``, and the pool of texts written down."""

    last: Array
    ids: Array
    log_probs: Array
    cache: DecoderCache
    pool: Hypotheses
    done: Array


class _Selection(NamedTuple):
    """What a procedure makes of the candidates: who lives on, what is written down.

    Each ``beam [B, K]`` is the parent, each ``token [B, K]`` what it emits; ``offered_scores`` is
    -inf where nothing is to be written down.
    """

    beam: Array
    token: Array
    log_probs: Array
    offered_beam: Array
    offered_token: Array
    offered_scores: Array


def length_penalty(lengths: Any, exponent: float) -> Any:
    """``((5 + lengths) / 6) ** exponent``, lengths counted without the prompt."""
    return ((5.0 + lengths) / 6.0) ** exponent


def beam_search(
    model: MPlug,
    params: Any,
    memory: Array,
    memory_mask: Array,
    config: BeamConfig,
    *,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    prompt_ids: Array | None = None,
    allowed: Array | None = None,
) -> Hypotheses:
    """The best texts found for each picture.

    The keys and values of ``memory`` are computed once a picture and shared by its beams.

    Args:
      memory: ``[B, M, D]`` with mask ``[B, M]``.
      prompt_ids: ``[P]`` or ``[B, P]`` int32 with its leading [CLS] (None: [CLS] alone): what the
        texts continue. The official captions of videos drop the prompt's last word.
      allowed: bool ``[vocab]`` or ``[max_length, vocab]``, the only tokens (of each step) that may
        be generated; probabilities are then those within the set.

    Returns:
      texts without the prompt. Standard texts hold no [CLS] or padding and end at [SEP], unless
      ``max_length`` cut them off; official ones may go on after it.

    Raises:
      ValueError: a prompt or ``allowed`` of the wrong shape; too few positions in the model.
    """
    prompt = prompt_rows(prompt_ids, cls_id, memory.shape[0])
    last, cache = read_prompt(model, params, memory, memory_mask, prompt, config.max_length)
    logits_of = next_logits(model, params, memory_mask, config.max_length, allowed)
    penalties = length_penalty(np.arange(1, config.max_length + 1), config.length_penalty)
    penalties = jnp.asarray(penalties, jnp.float32)
    official = config.procedure == "official"
    select = _select_official if official else _select_standard

    def unfinished(search: _Search) -> Array:
        return (search.pool.steps < config.max_length) & ~search.done.all()

    def extend(search: _Search) -> _Search:
        step = search.pool.steps
        logits, cache = logits_of(search.last.reshape(-1), step, search.cache)
        log_probs = jax.nn.log_softmax(logits).reshape(*search.last.shape, -1)
        too_early = without(log_probs, sep_id, value=OFFICIAL_FORBIDDEN if official else -jnp.inf)
        log_probs = jnp.where(step < config.min_length, too_early, log_probs)
        if not official:
            # As in greedy decoding: neither ever follows anything in a text.
            log_probs = without(log_probs, cls_id, pad_id)
        chosen = select(search.log_probs[..., None] + log_probs, penalties, step, sep_id)
        pool = _write_down(search, chosen)
        if official:
            ended = (chosen.token[:, 0] == sep_id) | (step + 1 == config.max_length)
        else:
            # No score of a longer text exceeds that of its beginning at the largest penalty.
            ended = pool.scores[:, -1] >= chosen.log_probs[:, 0] / penalties[-1]
        return _Search(
            last=chosen.token,
            ids=_extended(search.ids, chosen.beam, chosen.token, step),
            log_probs=chosen.log_probs,
            cache=cache.reorder(chosen.beam),
            pool=pool,
            done=search.done | ended,
        )

    search = jax.lax.while_loop(unfinished, extend, _start(last, cache, config, pad_id))
    if official:
        return search.pool
    # What max_length cut off competes with what ended.
    cut = jnp.where(search.done[:, None], -jnp.inf, search.log_probs / penalties[-1])
    return _best(search.pool, search.ids, cut, config.max_length)


def _start(last: Array, cache: DecoderCache, config: BeamConfig, pad_id: int) -> _Search:
    """All beams at the end of the prompt, of which ``last [B]`` is to be read."""
    rows, beams, kept = last.shape[0], config.beams, config.kept

    def empty(count: int) -> Array:
        return jnp.full((rows, count, config.max_length), pad_id, jnp.int32)

    # The beams start alike: only the first counts, or each candidate would come K times.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    return _Search(
        last=jnp.repeat(last[:, None], beams, axis=1),
        ids=empty(beams),
        log_probs=jnp.broadcast_to(first, (rows, beams)),
        cache=cache.fork(beams),
        pool=Hypotheses(
            ids=empty(kept),
            scores=jnp.full((rows, kept), -jnp.inf),
            lengths=jnp.zeros((rows, kept), jnp.int32),
            steps=jnp.int32(0),
        ),
        done=jnp.zeros((rows,), bool),
    )


def _top_candidates(scores: Array, count: int) -> tuple[Array, Array, Array]:
    """The best ``count`` of ``scores [B, K, vocab]``: values, parents and tokens ``[B, count]``."""
    vocab = scores.shape[-1]
    best, index = jax.lax.top_k(scores.reshape(scores.shape[0], -1), count)
    return best, index // vocab, index % vocab


def _select_official(totals: Array, penalties: Array, step: Array, sep_id: int) -> _Selection:
    """K best candidates live on; those with [SEP] are also written down, or all at the end."""
    penalty = penalties[step]
    scores, beam, token = _top_candidates(totals / penalty, totals.shape[1])
    is_sep = token == sep_id
    stored = is_sep | is_sep[:, :1] | (step + 1 == penalties.shape[0])
    # The official code recovers log p from the score, at the cost of a rounding.
    offered = jnp.where(stored, scores, -jnp.inf)
    return _Selection(beam, token, scores * penalty, beam, token, offered)


def _select_standard(totals: Array, penalties: Array, step: Array, sep_id: int) -> _Selection:
    """Of the K best candidates, those with [SEP] retire; the K best without it live on."""
    beams = totals.shape[1]
    # At most K of the candidates are a [SEP], so 2 K hold K others.
    log_probs, beam, token = _top_candidates(totals, 2 * beams)
    is_sep = token == sep_id
    offered = jnp.where(is_sep, log_probs / penalties[step], -jnp.inf)[:, :beams]
    alive, index = jax.lax.top_k(jnp.where(is_sep, -jnp.inf, log_probs), beams)
    living = [jnp.take_along_axis(x, index, axis=1) for x in (beam, token)]
    return _Selection(*living, alive, beam[:, :beams], token[:, :beams], offered)


def _extended(ids: Array, beam: Array, token: Array, step: Array) -> Array:
    """Texts ``[B, K, T]`` of the parents with ``token`` at ``step``."""
    return jnp.take_along_axis(ids, beam[..., None], axis=1).at[:, :, step].set(token)


def _write_down(search: _Search, chosen: _Selection) -> Hypotheses:
    """The pool after a step; that of a picture which is done stays as it is."""
    step = search.pool.steps
    ids = _extended(search.ids, chosen.offered_beam, chosen.offered_token, step)
    scores = jnp.where(search.done[:, None], -jnp.inf, chosen.offered_scores)
    return _best(search.pool, ids, scores, step + 1).replace(steps=step + 1)


def _best(pool: Hypotheses, ids: Array, scores: Array, length: Array | int) -> Hypotheses:
    """The best texts of the pool and of ``ids [B, K, T]``, equals in order of age."""
    scores = jnp.concatenate([pool.scores, scores], axis=1)
    lengths = jnp.concatenate([pool.lengths, jnp.full(ids.shape[:2], length, jnp.int32)], axis=1)
    scores, index = jax.lax.top_k(scores, pool.scores.shape[1])
    ids = jnp.concatenate([pool.ids, ids], axis=1)
    return pool.replace(
        ids=jnp.take_along_axis(ids, index[..., None], axis=1),
        scores=scores,
        lengths=jnp.take_along_axis(lengths, index, axis=1),
    )
