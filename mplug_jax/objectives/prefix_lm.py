"""Prefix language modelling: the decoder continues a caption from a picture and first words."""

import jax

from mplug_jax.objectives.token_losses import token_cross_entropy


def prefix_lm_loss(
    logits: jax.Array,
    target_ids: jax.Array,
    target_mask: jax.Array,
    valid: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss of the decoder. The shift happens here: position t predicts token t + 1.

    Args:
      logits: [B, T-1, V], what the decoder answers to `target_ids[:, :-1]`.
      target_ids: [B, T] int, [CLS] words [SEP], padded.
      target_mask: [B, T] bool, True on real tokens.
      valid: [B] bool.
      teacher_logits: [B, T-1, V] of the momentum model, or None.
      alpha: weight of the distillation.
      softmax_axis: see `soft_cross_entropy`.

    Returns:
      (sum over the predicted tokens of valid rows, their number), float32 scalars.
    """
    labels = target_ids[:, 1:]
    predicted = target_mask[:, 1:] & valid[:, None]
    return token_cross_entropy(logits, labels, predicted, teacher_logits, alpha, softmax_axis)
