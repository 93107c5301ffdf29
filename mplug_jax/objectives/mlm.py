"""Masked language modelling: BERT's corruption of the text, drawn on the device, and its loss."""

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import token_cross_entropy

IGNORED_LABEL = -100
MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1


def _random_ordinary_ids(
    rng: jax.Array, shape: tuple[int, ...], special: tuple[int, ...], vocab_size: int
) -> jax.Array:
    """Uniform token ids not in `special` (ascending, distinct, inside the vocabulary)."""
    ids = jax.random.randint(rng, shape, 0, vocab_size - len(special), dtype=jnp.int32)
    # Stepping over the specials in ascending order maps 0..n-1 onto the ordinary ids one to one.
    for special_id in special:
        ids += ids >= special_id
    return ids


def mask_tokens(
    rng: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    *,
    mask_id: int,
    special_ids: tuple[int, ...],
    vocab_size: int,
    rate: float = 0.15,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Corrupt a share of the tokens as BERT does: 80 % masked, 10 % random, 10 % left as they are.

    Each ordinary token is drawn with probability `rate`, independently, so a short text may have
    none: it then adds nothing to the loss. Special tokens (`mask_id` is one) and padding are never
    drawn, and a random replacement is never a special token.

    Args:
      rng: PRNG key.
      ids: [B, L] int32.
      mask: [B, L] bool, True on real tokens.
      mask_id: id of the mask token.
      special_ids: ids of the special tokens.
      vocab_size: number of ids.
      rate: probability that an ordinary token is drawn.

    Returns:
      (masked_ids [B, L] int32, labels [B, L] int32, label_mask [B, L] bool): `labels` is the
      original id where `label_mask` is True and -100 elsewhere.

    Raises:
      ValueError: for a rate outside 0..1, a special id outside the vocabulary, or a vocabulary
        of special tokens alone.
    """
    special = tuple(sorted({*special_ids, mask_id}))
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate of masked tokens must be in 0..1, got {rate}")
    if special[0] < 0 or special[-1] >= vocab_size or len(special) >= vocab_size:
        raise ValueError(f"special ids {special} do not fit a vocabulary of {vocab_size} tokens")
    draw_rng, kind_rng, token_rng = jax.random.split(rng, 3)
    ids = ids.astype(jnp.int32)
    ordinary = mask & ~jnp.isin(ids, jnp.array(special))
    label_mask = ordinary & jax.random.bernoulli(draw_rng, rate, ids.shape)
    kind = jax.random.uniform(kind_rng, ids.shape)
    random_ids = _random_ordinary_ids(token_rng, ids.shape, special, vocab_size)
    corrupted = jnp.where(
        kind < MASKED_SHARE,
        mask_id,
        jnp.where(kind < MASKED_SHARE + RANDOM_SHARE, random_ids, ids),
    )
    masked_ids = jnp.where(label_mask, corrupted, ids)
    labels = jnp.where(label_mask, ids, IGNORED_LABEL)
    return masked_ids, labels, label_mask


def mlm_loss(
    logits: jax.Array,
    labels: jax.Array,
    label_mask: jax.Array,
    valid: jax.Array,
    teacher_logits: jax.Array | None = None,
    alpha: jax.Array | float = 0.0,
    softmax_axis: str = "vocabulary",
) -> tuple[jax.Array, jax.Array]:
    """Loss of the drawn tokens, predicted in place.

    Args:
      logits: [B, L, V].
      labels: [B, L] int, from `mask_tokens`.
      label_mask: [B, L] bool, the drawn tokens.
      valid: [B] bool.
      teacher_logits: [B, L, V] of the momentum model on the same corrupted text, or None.
      alpha: weight of the distillation.
      softmax_axis: see `soft_cross_entropy`.

    Returns:
      (sum over the drawn tokens of valid rows, their number), float32 scalars.
    """
    counted = label_mask & valid[:, None]
    return token_cross_entropy(logits, labels, counted, teacher_logits, alpha, softmax_axis)
