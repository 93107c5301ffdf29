"""Cross-entropy over tokens: the part that all losses on texts share."""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.distillation import mix, soft_cross_entropy


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] over the last axis.

    Args:
      logits: [..., C].
      labels: [...] int in 0..C-1.

    Returns:
      [...] float32.
    """
    logits = logits.astype(jnp.float32)
    # The largest becomes 0: of two large numbers that nearly agree, the difference would be coarse.
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # Picked by comparison, not by a gather: it stays local when the vocabulary is sharded, and its
    # gradient needs no scatter.
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - picked


def token_losses(
    logits: jax.Array,
    labels: jax.Array,
    weight_mask: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> jax.Array:
    """Cross-entropy of each counted position, optionally distilled from a momentum model.

    Args:
      logits: [..., L, V].
      labels: [..., L] int; read only where `weight_mask` is True.
      weight_mask: [..., L] bool, the positions that count.
      teacher_logits: [..., L, V] of the momentum model, or None for the hard loss alone.
      alpha: weight of the soft loss; ignored without a teacher.
      softmax_axis: see `soft_cross_entropy`.

    Returns:
      [..., L] float32, 0 where `weight_mask` is False. What stands at those positions,
      not-a-number included, reaches neither the losses nor their gradient; with `softmax_axis`
      'sequence' this holds of whole texts without a counted position.

    Raises:
      ValueError: if the shapes do not agree.
    """
    if logits.shape[:-1] != labels.shape or labels.shape != weight_mask.shape:
        raise ValueError(
            f"logits {logits.shape} need labels and mask of shape {logits.shape[:-1]}, "
            f"got labels {labels.shape} and mask {weight_mask.shape}"
        )
    # Masked on the way in as well as out: a NaN would survive the latter in the gradient.
    keep = weight_mask[..., None]
    logits = logits.astype(jnp.float32)
    losses = cross_entropy(jnp.where(keep, logits, 0.0), labels)
    if teacher_logits is not None:
        if teacher_logits.shape != logits.shape:
            raise ValueError(f"teacher logits {teacher_logits.shape} against {logits.shape}")
        if softmax_axis == "sequence":
            keep = jnp.any(keep, axis=-2, keepdims=True)
        student = jnp.where(keep, logits, 0.0)
        teacher = jnp.where(keep, teacher_logits.astype(jnp.float32), 0.0)
        losses = mix(losses, soft_cross_entropy(student, teacher, softmax_axis), alpha)
    return jnp.where(weight_mask, losses, 0.0)


def token_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weight_mask: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> tuple[jax.Array, jax.Array]:
    """Sum of `token_losses`, whose arguments these are, and the number of counted positions.

    Returns:
      (sum of the loss over the counted positions, their number), float32 scalars.

    Raises:
      ValueError: if the shapes do not agree.
    """
    losses = token_losses(logits, labels, weight_mask, teacher_logits, alpha, softmax_axis)
    return jnp.sum(losses), jnp.sum(weight_mask, dtype=jnp.float32)
