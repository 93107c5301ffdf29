"""Momentum distillation: soft targets over the vocabulary, and their mixture with the hard loss."""

import jax
import jax.numpy as jnp


def soft_cross_entropy(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Cross-entropy of the student against the teacher's distribution, a value per position.

    Both softmaxes run over the vocabulary, the last axis. (The official models take the student's
    log-softmax over the sequence axis, which is a mistake and is not reproduced.)

    Args:
      logits: [..., V] of the student.
      teacher_logits: [..., V] of the momentum model; no gradient reaches them.

    Returns:
      [...] float32.
    """
    teacher = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32), axis=-1)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # An entry the teacher rules out costs nothing, even if the student does so too (0 * -inf).
    return -jnp.sum(jnp.where(teacher == 0, 0.0, teacher * log_probs), axis=-1)


def mix(hard: jax.Array, soft: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """(1 - alpha) * hard + alpha * soft, the mixture of ALBEF (eq. 6, 7) and mPLUG."""
    return (1.0 - alpha) * hard + alpha * soft
