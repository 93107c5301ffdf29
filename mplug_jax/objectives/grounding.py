"""Visual grounding: the decoder writes a box as four coordinate tokens.

Boxes are [cx, cy, w, h] in 0..1 unless a name says corners: [x1, y1, x2, y2].
"""

import dataclasses

import jax
import jax.numpy as jnp

from mplug_jax.objectives.token_losses import cross_entropy

# Finite, and added rather than put in: so the official logits come out.
OUTSIDE_BINS = -1e4
GIOU_EPS = 1e-5
LARGEST_ERROR = 5.0
WEIGHTINGS = ("official", "own", "none")


@dataclasses.dataclass(frozen=True)
class CoordinateTokens:
    """The part of a vocabulary that stands for coordinates.

    Attributes:
      first: id of bin 0; bin i has id first + i.
      bins: number of bins, at least 2: bin i stands for i / (bins - 1).
      prefix: id of the token that the decoder starts from.
    """

    first: int
    bins: int
    prefix: int

    def __post_init__(self) -> None:
        if self.bins < 2 or self.first < 0 or self.prefix < 0:
            raise ValueError(f"coordinate tokens need ids from 0 and 2 bins or more, got {self}")


# [unused339] and [unused340] .. [unused676] of BERT's vocabulary: a bin a pixel at 336 px.
OFFICIAL_COORDINATES = CoordinateTokens(first=345, bins=337, prefix=344)


def boxes_to_bins(boxes: jax.Array, coordinates: CoordinateTokens) -> jax.Array:
    """Bins [..., 4] int32 of boxes [..., 4], cut to 0..1 and rounded down."""
    return jnp.floor(jnp.clip(boxes, 0.0, 1.0) * (coordinates.bins - 1)).astype(jnp.int32)


def bins_to_boxes(bins: jax.Array, coordinates: CoordinateTokens) -> jax.Array:
    """Boxes [..., 4] float32 of bins [..., 4]."""
    return bins.astype(jnp.float32) / (coordinates.bins - 1)


def box_ids(boxes: jax.Array, coordinates: CoordinateTokens) -> jax.Array:
    """[B, 5] int32: the prefix and the four coordinate tokens of boxes [B, 4].

    The decoder reads the first four and is to predict the last four.
    """
    tokens = coordinates.first + boxes_to_bins(boxes, coordinates)
    return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=coordinates.prefix)


def coordinate_logits(logits: jax.Array, coordinates: CoordinateTokens) -> jax.Array:
    """Logits [..., V] as float32, lowered by 1e4 outside the bins.

    Raises:
      ValueError: the vocabulary ends before the last bin.
    """
    size, end = logits.shape[-1], coordinates.first + coordinates.bins
    if end > size:
        raise ValueError(f"coordinate tokens {coordinates} do not fit a vocabulary of {size}")
    ids = jnp.arange(size)
    inside = (ids >= coordinates.first) & (ids < end)
    return logits.astype(jnp.float32) + jnp.where(inside, 0.0, OUTSIDE_BINS)


def predicted_boxes(logits: jax.Array, coordinates: CoordinateTokens) -> jax.Array:
    """Boxes [B, 4] of the likeliest bins of logits [B, 4, V]."""
    likeliest = jnp.argmax(coordinate_logits(logits, coordinates), axis=-1)
    return bins_to_boxes(likeliest - coordinates.first, coordinates)


def to_corners(boxes: jax.Array) -> jax.Array:
    """[..., 4] corners of boxes [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def giou(corners: jax.Array, others: jax.Array, eps: float = GIOU_EPS) -> jax.Array:
    """Generalised intersection over union (Rezatofighi et al. 2019), in -1..1.

    Args:
      corners, others: [..., 4], broadcast against each other.
      eps: added to both denominators; the default is the official value.

    Returns:
      [...] float32.
    """

    def area(low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)

    low_a, high_a = corners[..., :2], corners[..., 2:]
    low_b, high_b = others[..., :2], others[..., 2:]
    overlap = area(jnp.maximum(low_a, low_b), jnp.minimum(high_a, high_b))
    union = area(low_a, high_a) + area(low_b, high_b) - overlap
    hull = area(jnp.minimum(low_a, low_b), jnp.maximum(high_a, high_b))
    return overlap / (union + eps) - (hull - union) / (hull + eps)


def grounding_loss(
    logits: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    coordinates: CoordinateTokens,
    weighting: str = "own",
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the coordinate tokens, the heavier the further off the likeliest box is.

    Each token's cross-entropy is multiplied by |predicted - true coordinate|, at most 5, and by
    1 - GIoU of the whole box. Both weights come from the argmax of the same logits and carry no
    gradient: a token that is right costs nothing, unless `weighting` says otherwise.

    Args:
      logits: [B, 4, V], what the decoder answers to `box_ids(...)[:, :-1]`.
      boxes: [B, 4] true boxes.
      valid: [B] bool.
      coordinates: the coordinate tokens.
      weighting: "own", each picture's cross-entropy by its own weights; "official", each
        position's is averaged over the batch first, so that a picture's weights meet the whole
        batch's error; "none", plain cross-entropy.

    Returns:
      (sum over the coordinates of valid rows, their number), float32 scalars.

    Raises:
      ValueError: another weighting; see also `coordinate_logits`.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"grounding weighting {weighting!r} is unknown; choose {WEIGHTINGS}.")
    # Replaced on the way in: what stands in an invalid row must not reach the gradient.
    rows = valid[:, None]
    boxes = jnp.where(rows, boxes.astype(jnp.float32), 0.5)
    logits = jnp.where(rows[..., None], logits, 0.0)
    targets = box_ids(boxes, coordinates)[:, 1:]
    losses = cross_entropy(coordinate_logits(logits, coordinates), targets)
    if weighting == "official":
        losses = jnp.sum(jnp.where(rows, losses, 0.0), axis=0) / jnp.maximum(jnp.sum(valid), 1)
    if weighting != "none":
        predicted = jax.lax.stop_gradient(predicted_boxes(logits, coordinates))
        weights = jnp.minimum(jnp.abs(predicted - boxes), LARGEST_ERROR)
        weights *= 1.0 - giou(to_corners(predicted), to_corners(boxes))[:, None]
        losses = weights * losses
    loss_sum = jnp.sum(jnp.where(rows, losses, 0.0))
    return loss_sum, 4.0 * jnp.sum(valid, dtype=jnp.float32)
