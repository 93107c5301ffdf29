"""CLIP and DINOv2 files to the image encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mplug_jax.conversion.inference import check_sizes, vision_sizes
from mplug_jax.conversion.names import (
    CLIP_HUGGING_FACE,
    CLIP_OPENAI,
    DINOV2_HUGGING_FACE,
    Row,
    VisionNames,
    vision_rows,
)
from mplug_jax.conversion.report import ConversionError, Report, account_unused, closest
from mplug_jax.conversion.transfer import Filling, Tensors
from mplug_jax.models.config import DINOV2, VisionConfig


class Family(NamedTuple):
    """Image encoders of one naming.

    Attributes:
      anchor: a name that ends so is in every such file, and nothing else's; what precedes it is
        the prefix of the encoder.
      first_mlp: the first MLP kernel of layer 0.
      settings: fields of VisionConfig that the family fixes.
      dead: tensors that an image encoder has no use for, by pattern, and why.
    """

    title: str
    names: VisionNames
    anchor: str
    positions: str
    first_mlp: str
    settings: dict[str, Any]
    dead: tuple[tuple[str, str], ...]


_CLIP = VisionConfig()
_CLIP_SETTINGS = {n: getattr(_CLIP, n) for n in DINOV2 if n not in ("activation",)}
_CLIP_REST = (
    (
        r"(^|\.)(?<!visual\.)(text_model\.|transformer\.|token_embedding\.|ln_final\.|"
        r"positional_embedding$|text_projection|logit_scale$)",
        "CLIP's text tower",
    ),
    (r"(^|\.)(visual\.proj$|visual_projection\.)", "CLIP's output projection, not used"),
    (r"(^|\.)(input_resolution|context_length|vocab_size)$", "a setting of CLIP, not a weight"),
    (r"position_ids$", "the numbers 0, 1, 2, …"),
)
FAMILIES = (
    Family(
        "OpenAI CLIP",
        CLIP_OPENAI,
        "conv1.weight",
        "positional_embedding",
        "mlp.c_fc.weight",
        {**_CLIP_SETTINGS, "activation": _CLIP.activation},
        _CLIP_REST,
    ),
    Family(
        "CLIP in Hugging Face naming",
        CLIP_HUGGING_FACE,
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "mlp.fc1.weight",
        _CLIP_SETTINGS,
        _CLIP_REST,
    ),
    Family(
        "DINOv2 in Hugging Face naming",
        DINOV2_HUGGING_FACE,
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.position_embeddings",
        "mlp.fc1.weight",
        DINOV2,
        ((r"embeddings\.mask_token$", "DINOv2's token for masked patches, not used"),),
    ),
)


def family_of(tensors: Tensors) -> tuple[Family, str]:
    """The naming of an image encoder, and the prefix of its names.

    Raises:
      ConversionError: none that is known.
    """
    for family in FAMILIES:
        for name in tensors:
            prefix = name.removesuffix(family.anchor)
            if prefix != name and f"{prefix}{family.positions}" in tensors:
                return family, prefix
    raise ConversionError(
        "The file holds no image encoder that is known here: "
        + ", ".join(f"{family.title} (…{family.anchor})" for family in FAMILIES)
        + f". Its first names: {', '.join(list(tensors)[:5])}."
    )


def fill_image_encoder(filling: Filling, tensors: Tensors) -> Report:
    """Takes the image encoder of a file; all of it has to be there.

    Raises:
      ConversionError: the file holds none, or not the config's.
    """
    config = filling.config
    family, prefix = family_of(tensors)
    if config.vision.stem != "patch":
        raise ConversionError(
            f"config.model.vision.stem={config.vision.stem!r}: a {family.title} file has a patch "
            "convolution; set it to 'patch'."
        )
    if config.vision.qk_norm:
        raise ConversionError(
            f"config.model.vision.qk_norm=True: a {family.title} has none; set it to False."
        )
    report = Report(
        notes=[
            f"image encoder: {family.title}, names start with {prefix!r}; "
            f"{config.vision.heads} heads as the config says, which tensors do not show"
        ]
    )
    shown = shown_by(family, prefix, tensors)
    if shown["vision.layer_scale"] and config.vision.layer_scale:
        del shown["vision.layer_scale"]  # the file replaces whatever they would start from
    check_sizes(shown, config)
    rows: Iterator[Row] = vision_rows(family.names, config.vision, prefix)
    absent = filling.fill(rows, tensors, report)
    report.missing |= {row.place: f" = {row.name}{closest(row.name, tensors)}" for row in absent}
    account_unused(report, tensors, [row.name for row in absent], family.dead)
    return report


def shown_by(family: Family, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """Fields of the config that the tensors or the family determine."""
    blocks = f"{prefix}{family.names.blocks}"
    sizes = vision_sizes(
        tensors,
        patches=f"{prefix}{family.anchor}",
        positions=f"{prefix}{family.positions}",
        up=f"{blocks}0.{family.first_mlp}",
        blocks=blocks,
    )
    return {f"vision.{name}": value for name, value in (sizes | family.settings).items()}
