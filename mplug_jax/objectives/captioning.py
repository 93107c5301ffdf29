"""Captioning: the decoder reads the image tokens and predicts the caption."""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import token_cross_entropy


def caption_loss(
    logits: jax.Array,
    caption_ids: jax.Array,
    caption_mask: jax.Array,
    valid: jax.Array,
    prompt_length: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss of the tokens after the prompt; its mean over a batch is the official loss.

    The shift happens here: position t predicts token t + 1.

    Args:
      logits: [B, T-1, V], what the decoder answers to `caption_ids[:, :-1]`.
      caption_ids: [B, T] int, [CLS], the prompt's words, the caption's words, [SEP], padded.
      caption_mask: [B, T] bool, True on real tokens.
      valid: [B] bool.
      prompt_length: number of first tokens that are given, [CLS] among them. The official video
        captioning takes one less than its prompt has, and so learns the prompt's last word too.

    Returns:
      (sum over the predicted tokens of valid rows, their number), float32 scalars.

    Raises:
      ValueError: for a prompt without [CLS], or one that fills the caption.
    """
    length = caption_ids.shape[1]
    if not 1 <= prompt_length < length:
        raise ValueError(f"prompt_length must be in 1..{length - 1}, got {prompt_length}")
    after_prompt = jnp.arange(1, length) >= prompt_length
    predicted = caption_mask[:, 1:] & after_prompt & valid[:, None]
    return token_cross_entropy(logits, caption_ids[:, 1:], predicted)
