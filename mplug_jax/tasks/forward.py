"""A model with its parameters, and what the decoder is given to read."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.models.mplug import MPlug

Array = jax.Array
MEMORIES = ("image", "fused")


class Forward(NamedTuple):
    """Calls the model's methods by name: ``forward("encode_image", image)``.

    Attributes:
      model, params: the module and its parameters.
      rng: of dropout, with its own key for every method; None: no dropout.
    """

    model: MPlug
    params: Any
    rng: Array | None = None

    def __call__(self, method: str, *args: Any) -> Any:
        rngs = {}
        if self.rng is not None:
            purpose = zlib.crc32(method.encode()) & 0x7FFFFFFF
            rngs["dropout"] = jax.random.fold_in(self.rng, purpose)
        return self.model.apply({"params": self.params}, *args, method=method, rngs=rngs)


def answer_logits(forward: Forward, memory: tuple[Array, Array], ids: Array) -> Array:
    """``[B, K, T-1, vocab]``: what the decoder answers to all but the last of ``ids [B, K, T]``, K
    texts of each picture that read the same memory."""
    count = ids.shape[1]
    memory, mask = (jnp.repeat(x, count, axis=0) for x in memory)
    logits = forward("decode", ids.reshape(-1, ids.shape[-1])[:, :-1], memory, mask)
    return logits.reshape(*ids.shape[:2], *logits.shape[1:])


def text_memory(forward: Forward, image: Array, ids: Array, mask: Array) -> tuple[Array, Array]:
    """Memory ``[B, V + L, D]`` and its mask of pictures (or clips) fused with texts ``[B, L]``."""
    embeds = forward("encode_image", image)
    fused = forward("fuse", embeds, forward("encode_text", ids, mask), mask)
    return forward("memory", *fused, mask)


def picture_memory(
    forward: Forward, image: Array, kind: str, cls_id: int, sep_id: int
) -> tuple[Array, Array]:
    """What a caption is written from: memory ``[B, M, D]`` and its mask.

    Args:
      kind: 'image', the image tokens alone as in the official captioning, or 'fused', the picture
        fused with the empty text as in prefix LM.

    Raises:
      ValueError: another kind.
    """
    if kind not in MEMORIES:
        raise ValueError(f"caption memory {kind!r} is unknown; choose {' or '.join(MEMORIES)}.")
    if kind == "image":
        embeds = forward("encode_image", image)
        return embeds, jnp.ones(embeds.shape[:2], bool)
    ids = jnp.broadcast_to(jnp.array([[cls_id, sep_id]]), (len(image), 2))
    return text_memory(forward, image, ids, jnp.ones(ids.shape, bool))
