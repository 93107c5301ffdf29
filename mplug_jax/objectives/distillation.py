"""Momentum distillation: soft targets over the vocabulary, and their mixture with the hard loss."""

import jax
import jax.numpy as jnp

# What the student's log-softmax is normalised over, by the axis of logits [..., L, V].
SOFTMAX_AXES = {"vocabulary": -1, "sequence": -2}


def soft_cross_entropy(
    logits: jax.Array, teacher_logits: jax.Array, softmax_axis: str = "vocabulary"
) -> jax.Array:
    """Cross-entropy of the student against the teacher's distribution, a value per position.

    The teacher's softmax always runs over the vocabulary, the last axis. So does the student's,
    unless `softmax_axis` is 'sequence': the official models (xbert.py, `log_softmax(..., dim=1)`)
    normalise it over the positions, which is a mistake, kept for comparison with their numbers.
    Each value then depends on the logits of all positions, padding included.

    Args:
      logits: [..., V] of the student; [..., L, V] for 'sequence'.
      teacher_logits: the same shape, of the momentum model; no gradient reaches them.
      softmax_axis: 'vocabulary' or 'sequence'.

    Returns:
      [...] float32.

    Raises:
      ValueError: for another `softmax_axis`.
    """
    if softmax_axis not in SOFTMAX_AXES:
        raise ValueError(
            f"softmax_axis {softmax_axis!r} is unknown; choose {' or '.join(SOFTMAX_AXES)}"
        )
    axis = SOFTMAX_AXES[softmax_axis]
    teacher = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32), axis=-1)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=axis)
    # An entry the teacher rules out costs nothing, even if the student does so too (0 * -inf).
    return -jnp.sum(jnp.where(teacher == 0, 0.0, teacher * log_probs), axis=-1)


def mix(hard: jax.Array, soft: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """(1 - alpha) * hard + alpha * soft, the mixture of ALBEF (eq. 6, 7) and mPLUG."""
    return (1.0 - alpha) * hard + alpha * soft
