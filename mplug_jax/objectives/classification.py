"""Classification of image-text pairs, as in NLVR2 and SNLI-VE."""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import cross_entropy


def classification_loss(
    logits: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy over classes.

    Args:
      logits: [B, C].
      labels: [B] int in 0..C-1.
      valid: [B] bool.

    Returns:
      (sum over the valid rows, their number), float32 scalars.
    """
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    losses = jnp.where(valid, cross_entropy(logits, labels), 0.0)
    return jnp.sum(losses), jnp.sum(valid, dtype=jnp.float32)


def classification_hits(
    logits: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(number of valid rows whose largest logit is the label's, number of valid rows).

    Arguments as in `classification_loss`; float32 scalars.
    """
    hits = (jnp.argmax(logits, axis=-1) == labels) & valid
    return jnp.sum(hits, dtype=jnp.float32), jnp.sum(valid, dtype=jnp.float32)
