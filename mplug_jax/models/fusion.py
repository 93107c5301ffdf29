"""The cross-modal skip-connected network of mPLUG, and the rivals it is compared with.

The text stream asks the (long) image stream for information in cheap *cross* layers, which leave
the image untouched; now and then a *connected* layer runs self-attention over both streams. The
schedules differ only in which layer is which (see ``layer_kinds``).
"""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.models.axes import constrain, constrain_rows
from mplug_jax.models.config import SCHEDULES, FusionConfig, TextConfig
from mplug_jax.models.layers import Array, KeysValues, layer_norm, rematerialised
from mplug_jax.models.stacking import split_parts
from mplug_jax.models.text_encoder import attention, mlp, residual


def layer_kinds(schedule: str, depth: int, stride: int) -> tuple[str, ...]:
    """The kind of each fusion layer: 'cross', 'connected' or 'co_attention'.

    - ``paper`` (Algorithm 1): layers i = 1..depth, connected iff ``i % (stride + 1) == 0``.
    - ``official`` (released weights): i = 0..depth-1, connected iff ``i > 0 and i % stride == 0``.
    - ``connected``, ``co_attention``, ``asymmetric``: all connected, all co-attention, all cross.

    Warns when the config asks for connected layers and its numbers leave none.
    """
    match schedule:
        case "paper":
            kinds = [i % (stride + 1) == 0 for i in range(1, depth + 1)]
        case "official":
            kinds = [i > 0 and i % stride == 0 for i in range(depth)]
        case "connected":
            kinds = [True] * depth
        case "asymmetric":
            return ("cross",) * depth
        case "co_attention":
            return ("co_attention",) * depth
        case _:
            raise ValueError(f"Unknown fusion schedule {schedule!r}; choose one of {SCHEDULES}.")
    if not any(kinds):
        warnings.warn(
            f"config.model.fusion: schedule={schedule!r} with depth={depth} and stride={stride} "
            "has no connected layer, so the image stream is never updated (as in 'asymmetric').",
            stacklevel=2,
        )
    return tuple("connected" if connected else "cross" for connected in kinds)


def take_rows(x: Array, index: Array | None) -> Array:
    """Rows ``x[index]``, or ``x`` itself where index is None.

    Args:
      index: ``[N]``, or ``[G, N / G]`` of rows within each of G equal parts of ``x``.

    Returns:
      ``[N, ...]``.
    """
    if index is None or index.ndim == 1:
        return x if index is None else jnp.take(x, index, axis=0)
    if len(index) == 1:
        return jnp.take(x, index[0], axis=0)
    parts = x.reshape(len(index), -1, *x.shape[1:])
    taken = jax.vmap(lambda rows, chosen: jnp.take(rows, chosen, axis=0))(parts, index)
    return taken.reshape(-1, *x.shape[1:])


class CrossLayer(nn.Module):
    """Text self-attention, text-to-image cross-attention, feed-forward."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, image: Array, text: Array, text_mask: Array, index: Array | None
    ) -> tuple[Array, Array]:
        attend = attention(self.config, self.dtype, "attention")
        cross = attention(self.config, self.dtype, "cross_attention", cross=True)
        mask = text_mask[:, None, None, :]
        text = residual(self.config, self.dtype, "after_attention")(
            text, lambda y: attend(y, y, mask)
        )
        # Keys and values are made once a picture and handed to every text that asks about it.
        shared = tuple(
            constrain(take_rows(x, index), "batch", "heads", None, None)
            for x in cross.keys_values(image)
        )
        text = residual(self.config, self.dtype, "after_cross_attention")(
            text, lambda y: cross.attend(y, shared, None)
        )
        text = residual(self.config, self.dtype, "after_mlp")(text, mlp(self.config, self.dtype))
        self.sow("intermediates", "output", text)
        return image, text


class ConnectedLayer(nn.Module):
    """Self-attention and feed-forward over ``[image; text]``.

    ``add_image``: the released models add the layer's image output to the image stream
    (official ``models/modeling_mplug.py``, FusionModel) where Algorithm 1 replaces it.
    ``read``: (M, G) where the image output is wanted of M rows alone, the last ones of each of G
    equal parts; None: of all. The others' image tokens are keys and values and nothing more.
    """

    config: TextConfig
    dtype: Any
    add_image: bool
    read: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, image: Array, text: Array, text_mask: Array) -> tuple[Array, Array]:
        attend = attention(self.config, self.dtype, "attention")
        after_attention = residual(self.config, self.dtype, "after_attention")
        after_mlp = residual(self.config, self.dtype, "after_mlp")
        feed_forward = mlp(self.config, self.dtype)

        def update(x: Array, shared: KeysValues, mask: Array) -> Array:
            x = after_attention(x, lambda y: attend.attend(y, shared, mask))
            return after_mlp(x, feed_forward)

        def keys_values(x: Array) -> KeysValues:
            return attend.keys_values(after_attention.inputs(x))

        length = image.shape[1]
        image_mask = jnp.ones(image.shape[:2], bool)
        mask = jnp.concatenate([image_mask, text_mask], axis=1)[:, None, None, :]
        x = jnp.concatenate([image, text], axis=1)
        if self.read is None:
            x = update(x, keys_values(x), mask)
            self.sow("intermediates", "output", x)
            new_image, text = x[:, :length], x[:, length:]
        else:
            text = update(text, keys_values(x), mask)
            count, parts = self.read
            # Keys and values of the few rows are made again: between devices they weigh more.
            x, mask = (split_parts(y, (len(y) - count, count), parts)[1] for y in (x, mask))
            image = x[:, :length]
            new_image = update(image, keys_values(x), mask) if count else image
        return (image + new_image if self.add_image else new_image), text


class CoAttentionLayer(nn.Module):
    """Two streams, each with self-attention, cross-attention to the other, feed-forward."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, image: Array, text: Array, text_mask: Array) -> tuple[Array, Array]:
        mask = text_mask[:, None, None, :]
        streams = {"image": (image, text, None, mask), "text": (text, image, mask, None)}
        outputs = {}
        for name, (x, other, self_mask, other_mask) in streams.items():
            attend = attention(self.config, self.dtype, f"{name}_attention")
            cross = attention(self.config, self.dtype, f"{name}_cross_attention", cross=True)
            feed_forward = mlp(self.config, self.dtype, f"{name}_mlp")
            wrap = [
                residual(self.config, self.dtype, f"{name}_after_{sublayer}")
                for sublayer in ("attention", "cross_attention", "mlp")
            ]
            x = wrap[0](x, lambda y, f=attend, m=self_mask: f(y, y, m))
            x = wrap[1](x, lambda y, f=cross, o=other, m=other_mask: f(y, o, m))
            outputs[name] = wrap[2](x, feed_forward)
        return outputs["image"], outputs["text"]


class Fusion(nn.Module):
    """Runs the schedule over image tokens and text tokens.

    ``image_index [N]`` names the picture of each of N texts among B pictures, so that several
    texts of one picture (the four objectives, hard negatives) share whatever depends on the
    picture alone: as long as no connected layer has run, keys and values are computed B times,
    not N times. None: text i goes with picture i. An index ``[G, N / G]`` names pictures within
    each of G equal parts of the batch: where the devices hold whole parts, no picture travels.

    Of the last ``image_rows`` M of the N rows (of each of those parts in equal number) image' is
    wanted, None for all: matching and MLM read text' alone, and where a connected layer is the
    last, most of its work goes into image'.

    Returns:
      (image' ``[M, V, D]``, text' ``[N, L, D]``).
    """

    config: FusionConfig
    text: TextConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        image: Array,
        text: Array,
        text_mask: Array,
        image_index: Array | None = None,
        image_rows: int | None = None,
    ) -> tuple[Array, Array]:
        parts = len(image_index) if image_index is not None and image_index.ndim == 2 else 1
        read = None if image_rows in (None, len(text)) else (image_rows, parts)
        kinds = layer_kinds(self.config.schedule, self.config.depth, self.config.stride)
        make = {
            "cross": (rematerialised(CrossLayer, self.remat), {}),
            "connected": (
                rematerialised(ConnectedLayer, self.remat),
                {"add_image": self.config.schedule == "official"},
            ),
            "co_attention": (rematerialised(CoAttentionLayer, self.remat), {}),
        }
        for i, kind in enumerate(kinds):
            layer_class, options = make[kind]
            if kind == "connected" and i == len(kinds) - 1:
                options, read = options | {"read": read}, None
            layer = layer_class(self.text, self.dtype, **options, name=f"layer_{i}")
            if kind == "cross":
                image, text = layer(image, text, text_mask, image_index)
                continue
            image, image_index = constrain_rows(take_rows(image, image_index)), None
            image, text = layer(image, text, text_mask)
        image = take_rows(image, image_index)
        if read is not None:
            image = split_parts(image, (len(image) - image_rows, image_rows), parts)[1]
        image = constrain_rows(image)
        if self.text.norm == "pre":
            text = layer_norm(self.text.ln_eps, "final_norm")(text).astype(self.dtype)
            if any(kind != "cross" for kind in kinds):
                norm = layer_norm(self.text.ln_eps, "final_image_norm")
                image = norm(image).astype(self.dtype)
        return image, text
