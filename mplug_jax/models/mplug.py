"""mPLUG: how the image encoder, text encoder, fusion network, decoder and heads are wired."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.models.axes import constrain_rows
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.decoder import Decoder, DecoderCache
from mplug_jax.models.fusion import Fusion
from mplug_jax.models.layers import (
    ACTIVATIONS,
    Array,
    Dropout,
    LMHead,
    kernel_init,
    layer_norm,
    zeros_init,
)
from mplug_jax.models.text_encoder import TextEncoder
from mplug_jax.models.vit import ViT


def _itm_prior(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """The bias of a head that says what holds of any pair: one in three is a match.

    With a head that begins with even odds, the first steps teach the whole fusion network a
    constant, in which the little that [CLS] knows of picture and text drowns.
    """
    return jnp.log(jnp.asarray([2 / 3, 1 / 3], dtype))


def _unit(x: Array) -> Array:
    x = constrain_rows(x.astype(jnp.float32))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class WidthBridge(nn.Module):
    """Linear, LayerNorm(1e-12), dropout from the ViT's width to the text width."""

    width: int
    dropout: float
    init_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=kernel_init(self.init_std, "embed", "embed_out"),
            bias_init=zeros_init("embed"),
            name="dense",
        )(x)
        x = layer_norm(1e-12, "layer_norm")(constrain_rows(x)).astype(self.dtype)
        return Dropout(self.dropout)(x)


class Classifier(nn.Module):
    """Dense, GELU, Dense from fused first tokens to class logits in float32."""

    classes: int
    width: int
    init_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, inputs: str, outputs: str, name: str) -> nn.Dense:
            init = kernel_init(self.init_std, inputs, outputs)
            return nn.Dense(features, kernel_init=init, bias_init=zeros_init(outputs), name=name)

        hidden = dense(self.width, "embed", "embed_out", "hidden")(x.astype(jnp.float32))
        x = ACTIVATIONS["gelu"](hidden)
        return dense(self.classes, "embed_out", "classes", "out")(x)


class MPlug(nn.Module):
    """The whole model; ``apply`` one of its methods by name.

    Dropout acts when ``rngs={'dropout': key}`` is passed.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        t, dtype = c.text, c.compute_dtype
        self.visual_encoder = ViT(c.vision, dtype, c.remat, c.scan_unroll)
        if c.bridged:
            self.bridge = WidthBridge(t.width, t.dropout, t.init_std, dtype)
        self.text_encoder = TextEncoder(t, dtype, c.remat, c.scan_unroll)
        self.fusion = Fusion(c.fusion, t, dtype, c.remat)
        self.decoder = Decoder(c.decoder, t, dtype, c.remat, c.scan_unroll)
        self.mlm_head = LMHead(t.vocab_size, t.width, t.ln_eps, t.init_std, dtype)

        def head(features: int, axis: str) -> nn.Dense:
            init = kernel_init(t.init_std, "embed", axis)
            return nn.Dense(
                features, dtype=jnp.float32, kernel_init=init, bias_init=zeros_init(axis)
            )

        self.vision_proj = head(c.embed_dim, "projection")
        self.text_proj = head(c.embed_dim, "projection")
        self.itm_head = nn.Dense(
            2,
            dtype=jnp.float32,
            kernel_init=kernel_init(t.init_std, "embed", "classes"),
            bias_init=nn.with_logical_partitioning(_itm_prior, ("classes",)),
        )
        if c.frame_positions:
            self.frame_positions = self.param(
                "frame_positions", zeros_init("position", "embed"), (c.frames, t.width)
            )
        if c.classes:
            self.classifier = Classifier(c.classes, t.width, t.init_std)
        self.raw_temperature = self.param(
            "temperature", nn.initializers.constant(c.temperature), ()
        )

    def temperature(self) -> Array:
        """The ITC temperature in use, a float32 scalar."""
        limits = self.config.temperature_range
        return self.raw_temperature if limits is None else jnp.clip(self.raw_temperature, *limits)

    def encode_image(self, image: Array) -> Array:
        """``[B, H, W, 3]`` uint8 (or normalised float) to ``[B, V, D]``, class token first.

        Clips ``[B, T, H, W, 3]`` become ``[B, T V, D]``, the tokens of one frame after those of
        the other (official ``models/model_retrieval_mplug.py`` and its like for video). With
        ``frame_positions`` each frame's embedding is added to its tokens.
        Of ``[B, V, D']`` tokens that the visual encoder made earlier, only the bridge is left.
        """
        if image.ndim == 5:
            tokens = self.encode_image(image.reshape(-1, *image.shape[2:]))
            if self.config.frame_positions:
                tokens = tokens.reshape(*image.shape[:2], *tokens.shape[1:])
                tokens = tokens + self.frame_positions[:, None].astype(tokens.dtype)
            return tokens.reshape(image.shape[0], -1, tokens.shape[-1])
        encoded = image.ndim == 3
        x = image.astype(self.config.compute_dtype) if encoded else self.visual_encoder(image)
        return self.bridge(x) if self.config.bridged else x

    def encode_text(self, ids: Array, mask: Array) -> Array:
        """``[B, L]`` ids and mask to ``[B, L, D]``."""
        return self.text_encoder(ids, mask)

    def project_image(self, image_embeds: Array) -> Array:
        """Unit features ``[B, E]`` in float32 of the class token; of clips, of the mean of their
        frames' class tokens, which projects to the mean of the projections."""
        frames = image_embeds.reshape(
            len(image_embeds), self.config.frames, -1, image_embeds.shape[-1]
        )
        return _unit(self.vision_proj(frames[:, :, 0].mean(axis=1)))

    def project_text(self, text_embeds: Array) -> Array:
        """Unit features ``[B, E]`` in float32 of the first token."""
        return _unit(self.text_proj(text_embeds[:, 0]))

    def fuse(
        self,
        image_embeds: Array,
        text_embeds: Array,
        text_mask: Array,
        image_index: Array | None = None,
        image_rows: int | None = None,
    ) -> tuple[Array, Array]:
        """Skip-connected fusion: (image' ``[M, V, D]``, text' ``[N, L, D]``); see ``Fusion``."""
        return self.fusion(image_embeds, text_embeds, text_mask, image_index, image_rows)

    def fuse_text(
        self,
        image_embeds: Array,
        text_embeds: Array,
        text_mask: Array,
        image_index: Array | None = None,
    ) -> Array:
        """text' ``[N, L, D]`` of ``fuse`` alone, for less."""
        return self.fuse(image_embeds, text_embeds, text_mask, image_index, 0)[1]

    def match(self, fused_text: Array) -> Array:
        """ITM logits ``[N, 2]`` (no match, match) in float32 of the fused first token."""
        return self.itm_head(fused_text[:, 0])

    def classify(self, fused_text: Array) -> Array:
        """Class logits ``[N, classes]`` in float32 of the fused first tokens of ``classified``
        texts that follow each other, ``[N classified, L, D]``."""
        first = fused_text[:, 0]
        return self.classifier(first.reshape(-1, self.config.classified * first.shape[-1]))

    def mlm_logits(self, fused_text: Array) -> Array:
        """MLM logits ``[N, L, vocab]``, tied to the text encoder's word embeddings."""
        return self.mlm_head(fused_text, self.text_encoder.embeddings.word.embedding)

    def memory(self, image: Array, text: Array, text_mask: Array) -> tuple[Array, Array]:
        """What the decoder attends: ``[image; text]`` and its mask ``[N, V + L]``."""
        image_mask = jnp.ones(image.shape[:2], bool)
        return (
            jnp.concatenate([image, text], axis=1),
            jnp.concatenate([image_mask, text_mask], axis=1),
        )

    def decode(
        self, ids: Array, memory: Array, memory_mask: Array, mask: Array | None = None
    ) -> Array:
        """Teacher-forced logits ``[N, T, vocab]``; see ``Decoder``."""
        return self.decoder(ids, memory, memory_mask, mask)

    def init_cache(self, memory: Array, hypotheses: int, max_length: int) -> DecoderCache:
        """An empty decoding cache; see ``Decoder``."""
        return self.decoder.init_cache(memory, hypotheses, max_length)

    def decode_step(
        self, ids: Array, memory_mask: Array, cache: DecoderCache
    ) -> tuple[Array, DecoderCache]:
        """Logits of the next tokens and the longer cache; see ``Decoder``."""
        return self.decoder.decode_step(ids, memory_mask, cache)

    def __call__(self, image: Array, ids: Array, mask: Array) -> dict[str, Array]:
        """One pass through every part, for initialisation and shape evaluation."""
        image_embeds = self.encode_image(image)
        text_embeds = self.encode_text(ids, mask)
        fused_image, fused_text = self.fuse(image_embeds, text_embeds, mask)
        outputs = {
            "image_embeds": image_embeds,
            "text_embeds": text_embeds,
            "image_feats": self.project_image(image_embeds),
            "text_feats": self.project_text(text_embeds),
            "fused_image": fused_image,
            "fused_text": fused_text,
            "itm_logits": self.match(fused_text),
            "mlm_logits": self.mlm_logits(fused_text),
            "decoder_logits": self.decode(ids, *self.memory(fused_image, fused_text, mask)),
            "temperature": self.temperature(),
        }
        if self.config.classes:
            repeated = jnp.repeat(fused_text, self.config.classified, axis=0)
            outputs["class_logits"] = self.classify(repeated)
        return outputs


def init_params(config: ModelConfig, rng: Array) -> dict:
    """Freshly initialised parameters, boxed with their logical axis names."""
    height, width = config.vision.image_size
    clip = (config.frames,) if config.frames > 1 else ()
    image = jnp.zeros((1, *clip, height, width, 3), jnp.uint8)
    ids = jnp.zeros((1, 2), jnp.int32)
    return MPlug(config).init(rng, image, ids, jnp.ones_like(ids, bool))["params"]


def count_params(params: dict) -> int:
    """Number of scalars in a parameter tree."""
    return sum(int(x.size) for x in jax.tree.leaves(params))
