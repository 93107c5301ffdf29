"""What a file of weights is, in a few lines."""

from __future__ import annotations

import numpy as np

from mplug_jax.conversion.bert import bert_of
from mplug_jax.conversion.inference import bert_sizes
from mplug_jax.conversion.official import fine_tuning_names
from mplug_jax.conversion.official_sizes import VISUAL, read_sizes
from mplug_jax.conversion.reading import Weights
from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.vision import family_of, shown_by


def describe(weights: Weights) -> str:
    """Kind and sizes of the file, and every tensor with its shape."""
    count = sum(int(np.size(a)) for a in weights.tensors.values())
    lines = [f"{len(weights.tensors)} tensors, {count:,} numbers", *weights.notes, *_kind(weights)]
    lines += [f"  {name}: {np.shape(a)} {a.dtype}" for name, a in weights.tensors.items()]
    return "\n".join(lines)


def _kind(weights: Weights) -> list[str]:
    tensors = weights.tensors
    if any(name.startswith(VISUAL) for name in tensors):
        sizes = read_sizes(fine_tuning_names(tensors)[0], given={"fusion.stride": 1})
        return ["official mPLUG", *_listed(sizes.shown)]
    lines = []
    try:
        family, prefix = family_of(tensors)
        lines += [f"image encoder: {family.title}", *_listed(shown_by(family, prefix, tensors))]
    except ConversionError:
        pass
    try:
        prefix, layers = bert_of(tensors)
        sizes = {f"text.{k}": v for k, v in bert_sizes(tensors, prefix).items()}
        lines += [f"BERT of {layers} layers", *_listed(sizes)]
    except ConversionError:
        pass
    return lines or ["neither mPLUG, CLIP, DINOv2 nor BERT"]


def _listed(sizes: dict[str, object]) -> list[str]:
    return [f"  {name}: {value}" for name, value in sizes.items()]
