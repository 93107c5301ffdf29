"""The config of an official state dict, read off its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mplug_jax.conversion.inference import bert_sizes, depth_of, layer_numbers, vision_sizes
from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.transfer import Tensors
from mplug_jax.models.config import ModelConfig, preset
from mplug_jax.models.fusion import layer_kinds

FUSION = "fusion_encoder.encoder.layer."
VISUAL = "visual_encoder.visual."
# Strides of the released models by the width of their ViT; their heads are 64 wide.
RELEASED_STRIDES = {768: 3, 1024: 6}
HEAD_WIDTH = 64


class Sizes(NamedTuple):
    """A config inferred from a file.

    Attributes:
      config: with everything the file does not show taken from elsewhere.
      shown: 'vision.width': 768 and the like, what the tensors alone show.
      notes: how the rest was found, a line each.
    """

    config: ModelConfig
    shown: dict[str, Any]
    notes: list[str]


def model_config_from(
    tensors: Tensors,
    *,
    like: ModelConfig | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    fusion_depth: int | None = None,
    fusion_stride: int | None = None,
) -> ModelConfig:
    """The config of an official state dict in fine-tuned naming; see ``read_sizes``."""
    given = {
        "vision.image_size": image_size and (image_size, image_size),
        "vision.heads": vision_heads,
        "text.heads": text_heads,
        "fusion.depth": fusion_depth,
        "fusion.stride": fusion_stride,
    }
    return read_sizes(tensors, like, {k: v for k, v in given.items() if v is not None}).config


def read_sizes(
    tensors: Tensors, like: ModelConfig | None = None, given: dict[str, Any] | None = None
) -> Sizes:
    """Infers a config from an official state dict in fine-tuned naming.

    Args:
      like: where to take what no tensor shows (dropout, the sizes of absent parts, heads, the
        fusion stride while dead weights hide it); default the released model of the ViT's width.
      given: 'fusion.stride': 3 and the like, which goes before what would be inferred.

    Raises:
      ConversionError: the tensors contradict each other, or something that nothing shows is
        neither in ``like`` nor given.
    """
    given = dict(given or {})
    kernel = tensors.get(f"{VISUAL}conv1.weight")
    large = kernel is not None and kernel.shape[0] == preset("large").vision.width
    base = like or preset("large" if large else "base")
    notes: list[str] = []
    shown = _vision(tensors) | _text(tensors) | _fusion(tensors, base, given, notes)
    if "vision_proj.weight" in tensors:
        shown["embed_dim"] = np.shape(tensors["vision_proj.weight"])[0]
    inferred = shown | _unseen(shown, like, given, notes) | given
    parts: dict[str, Any] = {}
    for name, value in inferred.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    try:
        return Sizes(base.replace(**parts.pop("", {}), **parts), shown, notes)
    except ValueError as error:
        raise ConversionError(f"The sizes of the file make no model: {error}") from error


def fusion_layers_of(tensors: Tensors) -> int:
    """How many layers the file numbers in its fusion network, 12 where it has none."""
    numbers = layer_numbers(tensors, FUSION)
    return numbers[-1] + 1 if numbers else 12


def _vision(tensors: Tensors) -> dict[str, Any]:
    if not any(name.startswith(VISUAL) for name in tensors):
        return {}
    blocks = f"{VISUAL}transformer.resblocks."
    sizes = vision_sizes(
        tensors,
        patches=f"{VISUAL}conv1.weight",
        positions=f"{VISUAL}positional_embedding",
        up=f"{blocks}0.mlp.c_fc.weight",
        blocks=blocks,
    )
    return {f"vision.{name}": value for name, value in sizes.items()}


def _text(tensors: Tensors) -> dict[str, Any]:
    for prefix in ("text_encoder.", "text_decoder.bert.", "fusion_encoder."):
        if f"{prefix}embeddings.word_embeddings.weight" in tensors:
            sizes = {f"text.{k}": v for k, v in bert_sizes(tensors, prefix).items()}
            break
    else:
        raise ConversionError(
            "No word embeddings under text_encoder., text_decoder.bert. or fusion_encoder.: "
            "this is no mPLUG state dict. Its first names: " + ", ".join(list(tensors)[:5])
        )
    for part, prefix in (
        ("text", "text_encoder.encoder.layer."),
        ("decoder", "text_decoder.bert.encoder.layer."),
    ):
        if depth := depth_of(tensors, prefix):
            sizes[f"{part}.depth"] = depth
    if "text.mlp_dim" not in sizes:
        ups = [n for n in tensors if n.endswith(".intermediate.dense.weight")]
        sizes |= {"text.mlp_dim": np.shape(tensors[ups[0]])[0]} if ups else {}
    return sizes


def _fusion(
    tensors: Tensors, base: ModelConfig, given: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Depth and stride as far as they show: dead layers and dead cross-attention hide them."""
    numbers = layer_numbers(tensors, FUSION)
    if not numbers:
        return {}
    total = numbers[-1] + 1
    if numbers != list(range(numbers[0], total)):
        raise ConversionError(f"{FUSION}<i>: the file holds layers {numbers}, with a gap.")
    sizes: dict[str, Any] = {}
    if numbers[0]:
        sizes["fusion.depth"] = len(numbers)
    depth = given.get("fusion.depth", sizes.get("fusion.depth", base.fusion.depth))
    if depth > len(numbers):
        raise ConversionError(
            f"fusion.depth={depth}, but the file holds {len(numbers)} fusion layers."
        )
    if "fusion.depth" not in sizes:
        notes.append(f"fusion: the last {depth} of the file's {total} layers run")
    cross = [f"{FUSION}{i}.crossattention.self.query.weight" in tensors for i in numbers[-depth:]]
    connected = [j for j, has_cross in enumerate(cross) if not has_cross]
    if connected:
        sizes["fusion.stride"] = stride = max(connected[0], 1)
        kinds = layer_kinds("official", depth, stride)
        if [kind == "cross" for kind in kinds] != cross:
            raise ConversionError(
                f"Fusion layers {connected} of {depth} have no cross-attention: no stride of the "
                "official schedule leaves out just these."
            )
    return sizes


def _unseen(
    shown: dict[str, Any], like: ModelConfig | None, given: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Heads and stride that the tensors cannot show, and where they were taken from."""
    found: dict[str, Any] = {}
    for part in ("vision", "text"):
        width = shown.get(f"{part}.width")
        if width is None:
            continue
        usual = max(width // HEAD_WIDTH, 1)
        if f"{part}.heads" not in given and like is None:
            found[f"{part}.heads"] = usual
            notes.append(f"{part}.heads={usual}: {HEAD_WIDTH} wide, as in all released models")
        elif like is not None and (heads := getattr(like, part).heads) != usual:
            notes.append(f"{part}.heads={heads} from the config; in released models it is {usual}")
    if "fusion.stride" in shown or "fusion.stride" in given or like is not None:
        return found
    width = shown.get("vision.width")
    if width not in RELEASED_STRIDES:
        raise ConversionError(
            "The fusion stride does not show in the tensors, since connected layers keep unused "
            f"cross-attention, and no released model has a ViT of width {width}: give "
            "--fusion_stride or --config."
        )
    found["fusion.stride"] = RELEASED_STRIDES[width]
    notes.append(
        f"fusion.stride={RELEASED_STRIDES[width]}: that of the released model with a ViT of width "
        f"{width}; the tensors do not show it"
    )
    return found
