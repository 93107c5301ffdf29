"""Image-text matching: a hard negative for each picture and each text, and the two-way loss.

A batch of B pairs becomes 3B, in the official order: rows 0..B are the pairs themselves,
rows B..2B a negative image with the pair's own text, rows 2B..3B the pair's own image with a
negative text.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import cross_entropy


class ITMNegatives(NamedTuple):
    """Rows of the batch that serve as negatives.

    Attributes:
      text_for_image: [B] int32, the text put beside image i, and text_ok [B] bool.
      image_for_text: [B] int32, the image put beside text i, and image_ok [B] bool.
      Where `ok` is False there was none to draw and the index is 0.
    """

    text_for_image: jax.Array
    text_ok: jax.Array
    image_for_text: jax.Array
    image_ok: jax.Array


def _candidates(image_ids: jax.Array, valid: jax.Array, pools: int) -> jax.Array:
    """[B, B] bool: column j may be a negative of row i."""
    pool = jnp.arange(len(valid)) // (len(valid) // pools)
    same_pool = pool[:, None] == pool
    return (image_ids[:, None] != image_ids) & valid[:, None] & valid & same_pool


def negative_weights(
    sims: jax.Array, image_ids: jax.Array, valid: jax.Array, pools: int = 1
) -> jax.Array:
    """Probability of each column to be drawn as the negative of a row.

    The official code zeroes the columns of the same picture in the softmax over the whole batch and
    leaves the normalising to the draw. The softmax over the candidates alone is the same
    distribution, and does not vanish when a row's own pair dominates: there the official weights
    underflow to zero and nothing can be drawn.

    Args:
      sims: [B, B] similarities divided by the temperature; gradients stop here.
      image_ids: [B] int32.
      valid: [B] bool.
      pools: the rows are cut into so many equal pools; columns of other pools get 0.

    Returns:
      [B, B] float32; a row sums to 1, or to 0 if it is invalid or has no candidate.
    """
    candidates = _candidates(image_ids, valid, pools)
    sims = jax.lax.stop_gradient(sims).astype(jnp.float32)
    any_candidate = jnp.any(candidates, axis=-1, keepdims=True)
    # A row without candidates is given finite logits, for its softmax would be 0 / 0.
    logits = jnp.where(candidates, sims, jnp.where(any_candidate, -jnp.inf, 0.0))
    return jnp.where(candidates, jax.nn.softmax(logits, axis=-1), 0.0)


def _draw(rng: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(column [B] int32, ok [B] bool) drawn by weights [B, B]; column 0 where all are zero."""
    ok = jnp.any(weights > 0, axis=-1)
    columns = jax.random.categorical(rng, jnp.log(weights), axis=-1)
    return jnp.where(ok, columns, 0).astype(jnp.int32), ok


def sample_negatives(
    rng: jax.Array,
    image_to_text: jax.Array,
    text_to_image: jax.Array,
    image_ids: jax.Array,
    valid: jax.Array,
    pools: int = 1,
) -> ITMNegatives:
    """Draw a text for each image and an image for each text, the likelier the more similar.

    Args:
      rng: PRNG key.
      image_to_text, text_to_image: [B, B] from `itc_loss`.
      image_ids: [B] int32; a pair of equal ids is never drawn.
      valid: [B] bool; other rows neither draw nor are drawn.
      pools: the rows are cut into so many equal pools, and each draws from its own. The official
        code draws from the rows of one device.
    """
    text_rng, image_rng = jax.random.split(rng)
    texts, text_ok = _draw(text_rng, negative_weights(image_to_text, image_ids, valid, pools))
    images, image_ok = _draw(image_rng, negative_weights(text_to_image, image_ids, valid, pools))
    return ITMNegatives(texts, text_ok, images, image_ok)


def itm_labels(batch_size: int) -> jax.Array:
    """[3B] int32: 1 (match) for the pairs, 0 for the two blocks of negatives."""
    return (jnp.arange(3 * batch_size) < batch_size).astype(jnp.int32)


def itm_mask(valid: jax.Array, negatives: ITMNegatives) -> jax.Array:
    """[3B] bool, in the module's row order: the rows that exist."""
    return jnp.concatenate([valid, negatives.image_ok, negatives.text_ok])


def itm_loss(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two-way cross-entropy.

    Args:
      logits: [3B, 2] in any order of rows; column 1 is "match".
      labels: [3B] int, from `itm_labels`, and mask: [3B] bool, from `itm_mask`, in that order.

    Returns:
      (sum over the rows that exist, their number), float32 scalars.
    """
    logits = jnp.where(mask[:, None], logits.astype(jnp.float32), 0.0)
    losses = jnp.where(mask, cross_entropy(logits, labels), 0.0)
    return jnp.sum(losses), jnp.sum(mask, dtype=jnp.float32)
