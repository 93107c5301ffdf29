"""Self-critical sequence training: captions of a beam search, made likelier by their reward.

The texts come from a search without gradient; here the decoder has read them again, teacher-forced,
which gives the scores of the search and, since the official search is differentiated through the
log-probabilities it has picked, its gradient.
"""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import token_losses


def beam_scores(
    logits: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    length_penalty: float = 0.6,
    prompt_length: int = 1,
) -> jax.Array:
    """log p / ((5 + generated tokens) / 6) ** length_penalty, the score of beam search.

    log p sums over all generated tokens: [SEP], and what a text of the official search holds
    after it.

    Args:
      logits: [..., T-1, V], what the decoder answers to `ids[..., :-1]`.
      ids: [..., T] int, [CLS] and the generated tokens, padded.
      mask: [..., T] bool, True on real tokens.
      length_penalty: its exponent.
      prompt_length: number of first tokens that were given, [CLS] among them.

    Returns:
      [...] float32; 0 for a text without a generated token.
    """
    generated = mask[..., 1:] & (jnp.arange(1, ids.shape[-1]) >= prompt_length)
    log_probs = -jnp.sum(token_losses(logits, ids[..., 1:], generated), axis=-1)
    return log_probs / ((5.0 + jnp.sum(generated, axis=-1)) / 6.0) ** length_penalty


def scst_loss(
    logits: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    rewards: jax.Array,
    valid: jax.Array,
    *,
    length_penalty: float = 0.6,
    prompt_length: int = 1,
    greedy_rewards: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-(score / number of tokens) * (reward - baseline), a value per text.

    Args:
      logits: [B, K, T-1, V], K texts a picture; see `beam_scores` for this, `ids` and `mask`.
      ids, mask: [B, K, T]; a text without a generated token does not exist.
      rewards: [B, K], CIDEr say, of these texts; no gradient.
      valid: [B] bool.
      length_penalty, prompt_length: see `beam_scores`.
      greedy_rewards: [B] rewards of the greedy texts as the baseline (Rennie et al. 2017); None
        takes the mean reward of the picture's own texts, the official baseline.

    Returns:
      (sum over the texts of valid rows, their number), float32 scalars.
    """
    exists = jnp.any(mask[..., prompt_length:], axis=-1) & valid[:, None]
    rewards = jnp.where(exists, jax.lax.stop_gradient(rewards).astype(jnp.float32), 0.0)
    if greedy_rewards is None:
        number = jnp.maximum(jnp.sum(exists, axis=-1, keepdims=True), 1)
        baseline = jnp.sum(rewards, axis=-1, keepdims=True) / number
    else:
        baseline = jnp.where(valid, jax.lax.stop_gradient(greedy_rewards), 0.0)[:, None]
    kept = mask & exists[..., None]
    scores = beam_scores(logits, ids, kept, length_penalty, prompt_length)
    # The official count: [CLS], and [SEP] where there is one, included.
    tokens = jnp.maximum(jnp.sum(kept, axis=-1), 1)
    losses = -scores / tokens * (rewards - baseline)
    return jnp.sum(jnp.where(exists, losses, 0.0)), jnp.sum(exists, dtype=jnp.float32)
