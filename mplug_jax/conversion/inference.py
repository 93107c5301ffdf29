"""Sizes of a model, read off the tensors of a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.transfer import Tensors, square_side
from mplug_jax.models.config import ModelConfig


def layer_numbers(names: Iterable[str], prefix: str) -> list[int]:
    """The i of all names ``<prefix><i>.…``, in order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(m[1]) for m in map(pattern.match, names) if m})


def depth_of(names: Iterable[str], prefix: str) -> int:
    """Layers ``<prefix>0.`` to the last.

    Raises:
      ConversionError: one between them is missing.
    """
    found = layer_numbers(names, prefix)
    gaps = sorted(set(range(len(found))) ^ set(found))
    if gaps:
        raise ConversionError(
            f"{prefix}<i>: the file holds layers {found}; number {gaps[0]} is missing."
        )
    return len(found)


def vision_sizes(
    tensors: Tensors, *, patches: str, positions: str, up: str, blocks: str
) -> dict[str, Any]:
    """Fields of VisionConfig that the tensors of an image encoder show.

    Args:
      patches, positions, up: names of the patch convolution's kernel, of the position embeddings
        and of the first MLP kernel of layer 0.
      blocks: prefix of the numbered layers.
    """
    for name in (patches, positions, up):
        if name not in tensors:
            raise ConversionError(f"The image encoder of the file lacks {name}.")
    width, _, *patch = np.shape(tensors[patches])
    table = np.shape(tensors[positions])
    side = square_side(table[-2] - 1)
    return {
        "image_size": (side * patch[0], side * patch[1]),
        "patch_size": tuple(patch),
        "width": width,
        "depth": depth_of(tensors, blocks),
        "mlp_dim": np.shape(tensors[up])[0],
    }


def bert_sizes(tensors: Tensors, prefix: str) -> dict[str, Any]:
    """Fields of TextConfig that a BERT's tensors show, but its depth."""
    sizes = {}
    for name, rows in (
        ("word_embeddings", "vocab_size"),
        ("position_embeddings", "max_positions"),
        ("token_type_embeddings", "type_vocab_size"),
    ):
        full = f"{prefix}embeddings.{name}.weight"
        if full not in tensors:
            raise ConversionError(f"The file lacks {full}.")
        sizes[rows], sizes["width"] = np.shape(tensors[full])
    up = [n for n in tensors if n.startswith(prefix) and n.endswith(".intermediate.dense.weight")]
    if up:
        sizes["mlp_dim"] = np.shape(tensors[up[0]])[0]
    return sizes


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """'vision.width': 768 and so on of a config."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= fields_of(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def check_sizes(found: Mapping[str, Any], config: ModelConfig) -> None:
    """Compares what a file shows with a config; the picture's size may differ.

    Args:
      found: 'vision.width' and the like.

    Raises:
      ConversionError: with all differences.
    """
    wanted = fields_of(config)
    lines = [
        f"  model.{name}: {value} in the file, {wanted[name]} in the config"
        for name, value in found.items()
        if name != "vision.image_size" and value != wanted[name]
    ]
    if lines:
        raise ConversionError("The file is not the config's model:\n" + "\n".join(lines))
