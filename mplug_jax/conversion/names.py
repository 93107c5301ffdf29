"""The one table of names: our parameters beside those of official mPLUG, CLIP, DINOv2 and BERT.

A line is (our module, their module, kind of ``layouts.KINDS``[, which third of a packed array]).
Import and export both read it. Sources: the official ``models/clip/model.py`` and
``models/modeling_mplug.py`` (state-dict names), Hugging Face's ``modeling_clip.py``,
``modeling_dinov2.py`` and ``modeling_bert.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mplug_jax.conversion.layouts import KINDS, Layout
from mplug_jax.models.config import ModelConfig, VisionConfig
from mplug_jax.models.fusion import layer_kinds


class Row(NamedTuple):
    """One array of theirs, or a third of it, that makes one of ours, or a layer of it.

    Attributes:
      path: 'visual_encoder/blocks/mlp/up/kernel'.
      layer: index on the leading axis of a parameter stacked over layers, or None.
      name: their full name.
      part: 0, 1, 2 where theirs packs query, key and value, else None.
    """

    path: str
    layer: int | None
    name: str
    layout: Layout
    part: int | None = None

    @property
    def place(self) -> str:
        """'path', or 'path [layer]', as reports name it."""
        return self.path if self.layer is None else f"{self.path} [{self.layer}]"


Lines = Sequence[tuple]

BERT_EMBEDDINGS: Lines = (
    ("word", "word_embeddings", "table"),
    ("position", "position_embeddings", "table"),
    ("token_type", "token_type_embeddings", "table"),
    ("layer_norm", "LayerNorm", "norm"),
)
BERT_SELF: Lines = (
    ("attention/query", "attention.self.query", "split"),
    ("attention/key", "attention.self.key", "split"),
    ("attention/value", "attention.self.value", "split"),
    ("attention/out", "attention.output.dense", "merge"),
    ("after_attention/layer_norm", "attention.output.LayerNorm", "norm"),
)
BERT_CROSS: Lines = (
    ("cross_attention/query", "crossattention.self.query", "split"),
    ("cross_attention/key", "crossattention.self.key", "split"),
    ("cross_attention/value", "crossattention.self.value", "split"),
    ("cross_attention/out", "crossattention.output.dense", "merge"),
    ("after_cross_attention/layer_norm", "crossattention.output.LayerNorm", "norm"),
)
BERT_MLP: Lines = (
    ("mlp/up", "intermediate.dense", "dense"),
    ("mlp/down", "output.dense", "dense"),
    ("after_mlp/layer_norm", "output.LayerNorm", "norm"),
)
BERT_HEAD: Lines = (
    ("transform", "transform.dense", "dense"),
    ("layer_norm", "transform.LayerNorm", "norm"),
    ("bias", "bias", "array"),
)
OFFICIAL_HEADS: Lines = (
    ("vision_proj", "vision_proj", "dense"),
    ("text_proj", "text_proj", "dense"),
    ("itm_head", "itm_head", "dense"),
    ("temperature", "temp", "array"),
)
OFFICIAL_BRIDGE: Lines = (
    ("bridge/dense", "visn_fc", "dense"),
    ("bridge/layer_norm", "visn_layer_norm", "norm"),
)


class VisionNames(NamedTuple):
    """A family's image encoder: what lies outside the blocks, where they are, what is in one."""

    outside: Lines
    blocks: str
    block: Lines


CLIP_OPENAI = VisionNames(
    (
        ("patch_embedding", "conv1", "patches"),
        ("class_embedding", "class_embedding", "array"),
        ("position_embedding", "positional_embedding", "array"),
        ("ln_pre", "ln_pre", "norm"),
        ("ln_post", "ln_post", "norm"),
    ),
    "transformer.resblocks.",
    (
        ("ln_1", "ln_1", "norm"),
        ("attention/query", "attn.in_proj", "packed", 0),
        ("attention/key", "attn.in_proj", "packed", 1),
        ("attention/value", "attn.in_proj", "packed", 2),
        ("attention/out", "attn.out_proj", "merge"),
        ("ln_2", "ln_2", "norm"),
        ("mlp/up", "mlp.c_fc", "dense"),
        ("mlp/down", "mlp.c_proj", "dense"),
    ),
)
CLIP_HUGGING_FACE = VisionNames(
    (
        ("patch_embedding", "embeddings.patch_embedding", "patches"),
        ("class_embedding", "embeddings.class_embedding", "array"),
        ("position_embedding", "embeddings.position_embedding", "weight"),
        ("ln_pre", "pre_layrnorm", "norm"),  # spelt so
        ("ln_post", "post_layernorm", "norm"),
    ),
    "encoder.layers.",
    (
        ("ln_1", "layer_norm1", "norm"),
        ("attention/query", "self_attn.q_proj", "split"),
        ("attention/key", "self_attn.k_proj", "split"),
        ("attention/value", "self_attn.v_proj", "split"),
        ("attention/out", "self_attn.out_proj", "merge"),
        ("ln_2", "layer_norm2", "norm"),
        ("mlp/up", "mlp.fc1", "dense"),
        ("mlp/down", "mlp.fc2", "dense"),
    ),
)
DINOV2_HUGGING_FACE = VisionNames(
    (
        ("patch_embedding", "embeddings.patch_embeddings.projection", "patches_bias"),
        ("class_embedding", "embeddings.cls_token", "token"),
        ("position_embedding", "embeddings.position_embeddings", "batch_of_one"),
        ("ln_post", "layernorm", "norm"),
    ),
    "encoder.layer.",
    (
        ("ln_1", "norm1", "norm"),
        ("attention/query", "attention.attention.query", "split"),
        ("attention/key", "attention.attention.key", "split"),
        ("attention/value", "attention.attention.value", "split"),
        ("attention/out", "attention.output.dense", "merge"),
        ("layer_scale_1/scale", "layer_scale1.lambda1", "array"),
        ("ln_2", "norm2", "norm"),
        ("mlp/up", "mlp.fc1", "dense"),
        ("mlp/down", "mlp.fc2", "dense"),
        ("layer_scale_2/scale", "layer_scale2.lambda1", "array"),
    ),
)


def rows(lines: Lines, ours: str, theirs: str, layer: int | None = None) -> Iterator[Row]:
    """The arrays of some modules, below a path of ours and a prefix of theirs."""
    for our_module, their_module, kind, *part in lines:
        for our_suffix, their_suffix, layout in KINDS[kind]:
            path, name = ours + our_module + our_suffix, theirs + their_module + their_suffix
            yield Row(path, layer, name, layout, *part)


def vision_rows(names: VisionNames, config: VisionConfig, prefix: str) -> Iterator[Row]:
    """The image encoder of a family whose names start with ``prefix``."""
    yield from rows(names.outside, "visual_encoder/", prefix)
    for i in range(config.depth):
        yield from rows(
            names.block, "visual_encoder/blocks/", f"{prefix}{names.blocks}{i}.", layer=i
        )


def block_rows(ours: str, theirs: str, layer: int | None, cross: bool) -> Iterator[Row]:
    """One BERT layer."""
    for lines in (BERT_SELF, BERT_CROSS, BERT_MLP) if cross else (BERT_SELF, BERT_MLP):
        yield from rows(lines, ours, theirs, layer)


def text_encoder_rows(config: ModelConfig, prefix: str) -> Iterator[Row]:
    """Embeddings and the first layers of a BERT."""
    yield from rows(BERT_EMBEDDINGS, "text_encoder/embeddings/", f"{prefix}embeddings.")
    for i in range(config.text.depth):
        yield from block_rows("text_encoder/blocks/", f"{prefix}encoder.layer.{i}.", i, cross=False)


def fusion_rows(config: ModelConfig, prefix: str, layers: int) -> Iterator[Row]:
    """The last of ``layers`` BERT layers; a connected layer has no cross-attention.

    Where the fusion network has more layers than that, its first are numbered below 0.
    """
    fusion = config.fusion
    for i, kind in enumerate(layer_kinds(fusion.schedule, fusion.depth, fusion.stride)):
        name = f"{prefix}encoder.layer.{layers - fusion.depth + i}."
        yield from block_rows(f"fusion/layer_{i}/", name, None, cross=kind == "cross")


def decoder_rows(config: ModelConfig, prefix: str) -> Iterator[Row]:
    """Embeddings and the first layers of a BERT, as the decoder's."""
    yield from rows(BERT_EMBEDDINGS, "decoder/embeddings/", f"{prefix}embeddings.")
    for i in range(config.decoder.depth):
        yield from block_rows("decoder/blocks/", f"{prefix}encoder.layer.{i}.", i, cross=True)


def official_rows(config: ModelConfig, fusion_layers: int) -> list[Row]:
    """Every parameter of the model in the official (fine-tuned) naming.

    Args:
      fusion_layers: layers that the state dict numbers in the fusion network: 12 in the released
        files, of which the last ``config.fusion.depth`` run.
    """
    found = list(vision_rows(CLIP_OPENAI, config.vision, "visual_encoder.visual."))
    if config.bridged:
        found += rows(OFFICIAL_BRIDGE, "", "")
    found += text_encoder_rows(config, "text_encoder.")
    found += fusion_rows(config, "fusion_encoder.", fusion_layers)
    found += decoder_rows(config, "text_decoder.bert.")
    found += rows(BERT_HEAD, "decoder/head/", "text_decoder.cls.predictions.")
    found += rows(BERT_HEAD, "mlm_head/", "fusion_encoder.cls.predictions.")
    found += rows(OFFICIAL_HEADS, "", "")
    return found
