"""Cross-entropy over tokens: the part that masked and prefix language modelling share."""

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
    # Picked by comparison, not by a gather: it stays local when the vocabulary is sharded, and its
    # gradient needs no scatter.
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weight_mask: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Masked token cross-entropy, optionally distilled from a momentum model.

    Args:
      logits: [B, L, V].
      labels: [B, L] int; read only where `weight_mask` is True.
      weight_mask: [B, L] bool, the positions that count.
      teacher_logits: [B, L, V] of the momentum model, or None for the hard loss alone.
      alpha: weight of the soft loss; ignored without a teacher.

    Returns:
      (sum of the loss over the counted positions, their number), float32 scalars. What stands at
      the other positions, not-a-number included, reaches neither the loss nor its gradient.

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
    logits = jnp.where(keep, logits.astype(jnp.float32), 0.0)
    losses = cross_entropy(logits, labels)
    if teacher_logits is not None:
        if teacher_logits.shape != logits.shape:
            raise ValueError(f"teacher logits {teacher_logits.shape} against {logits.shape}")
        teacher_logits = jnp.where(keep, teacher_logits.astype(jnp.float32), 0.0)
        losses = mix(losses, soft_cross_entropy(logits, teacher_logits), alpha)
    loss_sum = jnp.sum(jnp.where(weight_mask, losses, 0.0))
    return loss_sum, jnp.sum(weight_mask, dtype=jnp.float32)
