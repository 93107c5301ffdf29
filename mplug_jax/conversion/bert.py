"""BERT files to the text encoder, the fusion network and the decoder, as the paper starts them.

The text encoder takes BERT's first layers, the fusion network its last ones, the decoder all of
them from the start; cross-attention, which BERT has none of, stays at init (the official
``BertModel.from_pretrained`` calls do the same).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from mplug_jax.conversion.inference import bert_sizes, check_sizes, depth_of
from mplug_jax.conversion.names import (
    BERT_HEAD,
    Row,
    decoder_rows,
    fusion_rows,
    rows,
    text_encoder_rows,
)
from mplug_jax.conversion.report import ConversionError, Report, account_unused
from mplug_jax.conversion.transfer import Filling, Tensors

WORDS = "embeddings.word_embeddings.weight"
DEAD: tuple[tuple[str, str], ...] = (
    (r"position_ids$", "the numbers 0, 1, 2, …"),
    (r"(^|\.)pooler\.", "BERT's pooler, which mPLUG does not use"),
    (r"(^|\.)cls\.seq_relationship\.", "next-sentence head, which mPLUG has none of"),
    (r"cls\.predictions\.decoder\.bias$", "a copy of cls.predictions.bias"),
)


def modern_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """Old BERT files call a LayerNorm's weight and bias gamma and beta."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    result = {}
    for name, array in tensors.items():
        for ending, new in old.items():
            name = name.removesuffix(ending) + new if name.endswith(ending) else name
        result[name] = array
    return result


def bert_of(tensors: Tensors) -> tuple[str, int]:
    """What the names of a BERT start with ('' or 'bert.'), and its layers.

    Raises:
      ConversionError: the file holds none.
    """
    found = [name for name in tensors if name.endswith(WORDS)]
    if not found:
        raise ConversionError(
            f"The file holds no BERT (…{WORDS}). Its first names: {', '.join(list(tensors)[:5])}."
        )
    prefix = found[0].removesuffix(WORDS)
    return prefix, depth_of(tensors, f"{prefix}encoder.layer.")


def fill_text_towers(filling: Filling, tensors: Tensors) -> Report:
    """Takes a BERT for everything that reads or writes text.

    Raises:
      ConversionError: the file holds no BERT, or not one of the config's sizes.
    """
    config = filling.config
    tensors = modern_names(tensors)
    prefix, layers = bert_of(tensors)
    if config.text.norm != "post":
        raise ConversionError(
            f"config.model.text.norm={config.text.norm!r}: BERT normalises after each sub-layer; "
            "set it to 'post'."
        )
    if config.text.qk_norm:
        raise ConversionError("config.model.text.qk_norm=True: BERT has none; set it to False.")
    report = Report(
        notes=[
            f"text: BERT of {layers} layers, names start with {prefix!r}; text encoder: its first "
            f"{config.text.depth}, fusion: its last {min(config.fusion.depth, layers)}, decoder: "
            f"its first {min(config.decoder.depth, layers)}; {config.text.heads} heads as the "
            "config says, which tensors do not show"
        ]
    )
    check_sizes({f"text.{k}": v for k, v in bert_sizes(tensors, prefix).items()}, config)
    head = f"{_without_bert(prefix)}cls.predictions."
    absent = filling.fill(
        [
            *text_encoder_rows(config, prefix),
            *fusion_rows(config, prefix, layers),
            *decoder_rows(config, prefix),
            *rows(BERT_HEAD, "decoder/head/", head),
            *rows(BERT_HEAD, "mlm_head/", head),
        ],
        tensors,
        report,
    )
    _account_missing(absent, layers, report)
    _account_tied(tensors, head, prefix, report)
    account_unused(report, tensors, [row.name for row in absent], DEAD)
    return report


def _without_bert(prefix: str) -> str:
    """'' for 'bert.': the head lies beside the encoder."""
    return prefix.removesuffix("bert.")


def _account_missing(absent: Iterable[Row], layers: int, report: Report) -> None:
    """Why the rest of the text towers stays at init."""
    for row in absent:
        number = re.search(r"encoder\.layer\.(-?\d+)\.", row.name)
        if "cross_attention" in row.path:
            report.initial[row.place] = "BERT has no cross-attention"
        elif row.path.startswith(("mlm_head/", "decoder/head/")):
            report.initial[row.place] = "the file has no prediction head"
        elif number and not 0 <= int(number[1]) < layers and row.path[:4] != "text":
            report.initial[row.place] = f"this BERT has {layers} layers only"
        else:
            report.missing[row.place] = f" = {row.name}"


def _account_tied(tensors: Tensors, head: str, prefix: str, report: Report) -> None:
    name = f"{head}decoder.weight"
    if name in tensors:
        if np.array_equal(tensors[name], tensors[f"{prefix}{WORDS}"]):
            report.unused[name] = "equal to the word embeddings, with which it is tied"
        else:
            report.unexpected[name] = " (differs from the word embeddings; the head here is tied)"
