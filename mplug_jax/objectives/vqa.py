"""Visual question answering: the decoder predicts every answer that people gave, by its weight."""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import token_losses


def answer_losses(
    logits: jax.Array,
    answer_ids: jax.Array,
    answer_mask: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> jax.Array:
    """Next-token loss of each answer, summed over its tokens. Position t predicts token t + 1.

    Args:
      logits: [..., T-1, V], what the decoder answers to `answer_ids[..., :-1]`.
      answer_ids: [..., T] int, [CLS] words [SEP], padded.
      answer_mask: [..., T] bool, True on real tokens.
      teacher_logits: [..., T-1, V] of the momentum model, or None.
      alpha: weight of the distillation. (The official VQA model never passes its alpha on: 0
        gives its numbers.)
      softmax_axis: see `soft_cross_entropy`.

    Returns:
      [...] float32.
    """
    losses = token_losses(
        logits, answer_ids[..., 1:], answer_mask[..., 1:], teacher_logits, alpha, softmax_axis
    )
    return jnp.sum(losses, axis=-1)


def vqa_loss(
    logits: jax.Array,
    answer_ids: jax.Array,
    answer_mask: jax.Array,
    weights: jax.Array,
    valid: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> tuple[jax.Array, jax.Array]:
    """Loss of the answers to each question, weighted by how often they were given.

    Args:
      logits: [B, K, T-1, V], see `answer_losses`.
      answer_ids, answer_mask: [B, K, T], up to K answers a question.
      weights: [B, K], 0 where there is no answer.
      valid: [B] bool.
      teacher_logits, alpha, softmax_axis: see `answer_losses`; the teacher's are [B, K, T-1, V].

    Returns:
      (sum over the answers of valid questions, number of valid questions), float32 scalars.
    """
    asked = (weights != 0) & valid[:, None]
    losses = answer_losses(
        logits, answer_ids, answer_mask & asked[..., None], teacher_logits, alpha, softmax_axis
    )
    weights = jnp.where(asked, weights.astype(jnp.float32), 0.0)
    return jnp.sum(weights * losses), jnp.sum(valid, dtype=jnp.float32)
