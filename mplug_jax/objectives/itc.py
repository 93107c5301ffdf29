"""Image-text contrast with momentum features, queues of past ones, and soft targets (ALBEF §3.2).

Features are rows, [B, E] and [Q, E], L2-normalised by whoever makes them. Over several devices the
columns of the [B, B + Q] similarities are split, as the queue's rows are: the B queries travel and
the queue never does.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mplug_jax.models.axes import constrain, constrain_rows, shards
from mplug_jax.models.stacking import join_parts
from mplug_jax.objectives.distillation import mix

UNUSED_ID = -100
# Finite, so that a masked column times a zero target is zero and not a NaN.
MASKED_LOGIT = -1e30


@flax.struct.dataclass
class ITCQueue:
    """Ring of the last Q momentum features and the picture each came from.

    Attributes:
      image, text: [Q, E] float32, row i of both from the same pair.
      ids: [Q] int32 image ids; -100 marks a row that still holds its random start.
      pointer: int32 scalar, the next row to write.
    """

    image: jax.Array
    text: jax.Array
    ids: jax.Array
    pointer: jax.Array


class ITCOutput(NamedTuple):
    """Result of `itc_loss`: the masked loss, and the batch's similarities for hard negatives."""

    loss_sum: jax.Array
    count: jax.Array
    image_to_text: jax.Array
    text_to_image: jax.Array


def init_queue(rng: jax.Array, size: int, dim: int) -> ITCQueue:
    """A queue of `size` random unit rows, which serve as negatives until they are overwritten."""
    image_rng, text_rng = jax.random.split(rng)

    def unit_rows(key: jax.Array) -> jax.Array:
        rows = jax.random.normal(key, (size, dim), jnp.float32)
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    return ITCQueue(
        image=unit_rows(image_rng),
        text=unit_rows(text_rng),
        ids=jnp.full((size,), UNUSED_ID, jnp.int32),
        pointer=jnp.zeros((), jnp.int32),
    )


def enqueue(
    queue: ITCQueue,
    image_feats: jax.Array,
    text_feats: jax.Array,
    image_ids: jax.Array,
    valid: jax.Array,
) -> ITCQueue:
    """Write the valid rows of a batch at the pointer, around the end, oldest entries first.

    Invalid rows are skipped: the valid ones are written without gaps and the pointer moves by
    their number, so with all rows valid this is the official queue. The queue's size need not be a
    multiple of the batch; of a batch with more valid rows than the queue, the last ones stay.

    Args:
      queue: of Q rows.
      image_feats, text_feats: [B, E] momentum features of the batch; gradients stop here.
      image_ids: [B] int32.
      valid: [B] bool.
    """
    size = queue.ids.shape[0]
    count = jnp.sum(valid, dtype=jnp.int32)
    rank = jnp.cumsum(valid, dtype=jnp.int32) - 1
    # Each row has a slot of its own, for a scatter keeps no order among writes to one slot; slots
    # outside the queue are dropped.
    written = valid & (rank >= count - size)
    slots = jnp.where(written, (queue.pointer + rank) % size, size)

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        return rows.at[slots].set(jax.lax.stop_gradient(new).astype(rows.dtype), mode="drop")

    return ITCQueue(
        image=write(queue.image, image_feats),
        text=write(queue.text, text_feats),
        ids=write(queue.ids, image_ids),
        pointer=((queue.pointer + count) % size).astype(jnp.int32),
    )


def _spread(x: jax.Array) -> jax.Array:
    """[B, N] split over the devices by columns or, of a queue that they do not divide, by rows."""
    by_columns = x.shape[1] % shards("bank") == 0
    return constrain(x, "queries", "bank") if by_columns else constrain_rows(x)


def _similarities(queries: jax.Array, bank: jax.Array, temperature: jax.Array | float) -> jax.Array:
    # Full float32 products: a rounded cosine divided by a small temperature moves the softmax.
    sims = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST) / temperature
    return _spread(sims)


def _valid_rows(feats: jax.Array, valid: jax.Array) -> jax.Array:
    # Zeroed on the way in, so that garbage in an invalid row reaches no gradient either.
    return jnp.where(valid[:, None], feats.astype(jnp.float32), 0.0)


def _batch_columns(sims: jax.Array, parts: int) -> jax.Array:
    """[B, B] of the batch in its own order, out of [B, B + Q] whose columns were joined."""
    size = sims.shape[0]
    columns = sims.reshape(size, parts, -1)[:, :, : size // parts]
    return constrain_rows(columns.reshape(size, size))


def _hard_targets(query_ids: jax.Array, ids: jax.Array, columns: jax.Array) -> jax.Array:
    """[B, N]: equal shares for the allowed columns that show the query's picture."""
    same = ((query_ids[:, None] == ids) & columns).astype(jnp.float32)
    same = _spread(same)
    return same / jnp.maximum(jnp.sum(same, axis=-1, keepdims=True), 1.0)


def _direction(
    online: jax.Array,
    momentum: jax.Array | None,
    bank: jax.Array,
    columns: jax.Array,
    hard_targets: jax.Array,
    temperature: jax.Array | float,
    alpha: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """One direction of the contrast.

    Args:
      online: [B, E] queries.
      momentum: [B, E] the same queries by the momentum model, or None for hard targets alone.
      bank: [N, E] candidates, of which `columns` [N] are allowed.
      hard_targets: [B, N].
      temperature, alpha: scalars.

    Returns:
      (cross-entropies [B], similarities [B, N] over all columns).
    """
    sims = _similarities(online, bank, temperature)
    targets = hard_targets
    if momentum is not None:
        soft_sims = _similarities(momentum, bank, jax.lax.stop_gradient(temperature))
        soft_targets = jax.nn.softmax(jnp.where(columns, soft_sims, MASKED_LOGIT), axis=-1)
        targets = mix(hard_targets, soft_targets, alpha)
    log_probs = jax.nn.log_softmax(jnp.where(columns, sims, MASKED_LOGIT), axis=-1)
    return -jnp.sum(targets * log_probs, axis=-1), sims


def itc_loss(
    image_feats: jax.Array,
    text_feats: jax.Array,
    image_feats_m: jax.Array | None,
    text_feats_m: jax.Array | None,
    queue: ITCQueue | None,
    image_ids: jax.Array,
    valid: jax.Array,
    temperature: jax.Array | float,
    alpha: jax.Array | float,
) -> ITCOutput:
    """Contrast of the online features with [momentum features of the batch; queue].

    Target of a row = alpha * softmax(momentum similarities) + (1 - alpha) * (columns of the same
    picture, normalised); the loss is the mean of both directions. B is the global batch.

    Args:
      image_feats, text_feats: [B, E] online features.
      image_feats_m, text_feats_m: [B, E] momentum features, without gradient. None for both: the
        online features are their own bank, with gradient, and `alpha` is ignored.
      queue: past momentum features, or None.
      image_ids: [B] int32, equal for equal pictures.
      valid: [B] bool; other rows are neither queries nor candidates.
      temperature: positive scalar; the momentum similarities give it no gradient.
      alpha: weight of the momentum targets.

    Returns:
      ITCOutput(loss_sum, count, image_to_text [B, B], text_to_image [B, B]); the similarities are
      the online queries against the batch's part of the bank, divided by the temperature.

    Raises:
      ValueError: if one momentum feature is given without the other.
    """
    if (image_feats_m is None) != (text_feats_m is None):
        raise ValueError("give momentum features of both image and text, or of neither")

    image, text = _valid_rows(image_feats, valid), _valid_rows(text_feats, valid)
    image_m = text_m = None
    if image_feats_m is not None:
        image_m = jax.lax.stop_gradient(_valid_rows(image_feats_m, valid))
        text_m = jax.lax.stop_gradient(_valid_rows(text_feats_m, valid))
    image_bank, text_bank = (image, text) if image_m is None else (image_m, text_m)
    ids, columns, parts, size = image_ids, valid, 1, len(valid)
    if queue is not None:
        if size % shards("bank") == len(queue.ids) % shards("bank") == 0:
            # Joined by devices, no row of batch or queue leaves its own.
            parts = shards("bank")
        image_bank = join_parts((image_bank, queue.image), parts)
        text_bank = join_parts((text_bank, queue.text), parts)
        ids = join_parts((image_ids, queue.ids), parts)
        columns = join_parts((valid, jnp.ones_like(queue.ids, bool)), parts)

    shared = (columns, _hard_targets(image_ids, ids, columns), temperature, alpha)
    image_losses, image_to_text = _direction(image, image_m, text_bank, *shared)
    text_losses, text_to_image = _direction(text, text_m, image_bank, *shared)
    losses = jnp.where(valid, (image_losses + text_losses) / 2, 0.0)
    return ITCOutput(
        loss_sum=jnp.sum(losses),
        count=jnp.sum(valid, dtype=jnp.float32),
        image_to_text=_batch_columns(image_to_text, parts),
        text_to_image=_batch_columns(text_to_image, parts),
    )
