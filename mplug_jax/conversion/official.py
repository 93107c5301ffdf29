"""Official mPLUG state dicts to our parameters and back.

Names and quirks are those of the official ``models/model_*.py`` and of the loaders in its
``*_mplug.py`` scripts; no released file was at hand when this was written (docs/checkpoints.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mplug_jax.conversion.inference import fields_of
from mplug_jax.conversion.names import Row, official_rows
from mplug_jax.conversion.official_sizes import FUSION, fusion_layers_of
from mplug_jax.conversion.report import ConversionError, Report, account_unused, closest
from mplug_jax.conversion.transfer import Arrays, Filling, Tensors, export
from mplug_jax.models.config import ModelConfig

RELEASED_FUSION_LAYERS = 12
# What all official models have in common, besides sizes.
SETTINGS = {
    "vision.stem": "patch",
    "vision.activation": "quick_gelu",
    "vision.pre_norm": True,
    "vision.patch_bias": False,
    "vision.layer_scale": 0.0,
    "vision.qk_norm": False,
    "vision.ln_eps": 1e-5,
    "frame_positions": False,
    "text.norm": "post",
    "text.qk_norm": False,
    "text.ln_eps": 1e-12,
    "fusion.schedule": "official",
}
MLM_HEAD = "fusion_encoder.cls.predictions."
# A prediction head, and the word embeddings whose copy it holds as `decoder.weight`.
TIED: tuple[tuple[str, str], ...] = (
    ("text_decoder.cls.predictions.", "text_decoder.bert.embeddings.word_embeddings.weight"),
    (MLM_HEAD, "text_encoder.embeddings.word_embeddings.weight"),
)

# Tensors of official files that the model never reads, by pattern, and why.
DEAD: tuple[tuple[str, str], ...] = (
    (
        r"^visual_encoder\.(positional_embedding$|text_projection$|logit_scale$|token_embedding\.|"
        r"ln_final\.|transformer\.)",
        "CLIP's text tower, which mPLUG carries along and never runs",
    ),
    (r"^visual_encoder\.visual\.proj$", "CLIP's output projection, which mPLUG does not use"),
    (r"\.position_ids$", "the numbers 0, 1, 2, …"),
    (r"^fusion_encoder\.embeddings\.", "the fusion network reads the text encoder's output"),
    (
        rf"^{re.escape(MLM_HEAD)}decoder\.weight$",
        "the MLM head's own word embeddings: here it is tied to the text encoder's, so that MLM "
        "has to be trained again",
    ),
    (r"\.pooler\.", "BERT's pooler, which mPLUG does not use"),
    (r"^text_encoder\.cls\.", "the text encoder's own prediction head, which mPLUG does not use"),
    (r"^(image_queue|text_queue|idx_queue|queue_ptr)(_m)?$", "the ITC queue, which starts anew"),
    (r"^[a-z_]+_m\.", "momentum twin: the teacher starts as a copy of the model"),
    (r"^(bbox_prob_mask|prefix_ids|target_ids)$", "constants of the official grounding model"),
)
# Parts that a file may lack as a whole, and why.
ABSENT: tuple[tuple[str, str], ...] = (
    (r"^mlm_head/", "the file has no MLM head: fine-tuned models have none"),
    (r"^(vision_proj|text_proj)/", "the file's task has no contrastive loss"),
    (r"^temperature$", "the file's task has no contrastive loss"),
    (r"^itm_head/", "the file's task has no image-text matching"),
    (r"^decoder/", "the file's task has no decoder"),
    (r"^(text_encoder|fusion)/", "the file's task reads no text but the decoder's"),
)


def fine_tuning_name(name: str) -> str | None:
    """What the official fine-tuning scripts rename a tensor to; None: they drop it.

    In every name with 'fusion' or 'bert' and without 'decode' they delete the words 'fusion.' and
    'bert.', and then the old name, which loses the tensor where both names are the same.
    """
    if ("fusion" not in name and "bert" not in name) or "decode" in name:
        return name
    new = name.replace("fusion.", "").replace("bert.", "")
    return None if new == name else new


def fine_tuning_names(tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors under fine-tuned names, whichever naming the file has, and notes.

    Unlike the official scripts this keeps what they would drop: of a file in fine-tuned naming,
    the whole fusion network.
    """
    renamed = {name: fine_tuning_name(name) or name for name in tensors}
    changed = [name for name, new in renamed.items() if name != new]
    result: dict[str, np.ndarray] = {}
    for name, new in renamed.items():
        if new in result:
            raise ConversionError(f"The file holds {new} twice, once as {name}.")
        result[new] = tensors[name]
    notes = [f"pre-training names: {len(changed)} renamed as the official scripts do"]
    return result, notes if changed else []


def rename(tensors: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """The same tensors with the first matching prefix of each name replaced."""

    def new(name: str) -> str:
        for old, other in prefixes.items():
            if name.startswith(old):
                return other + name[len(old) :]
        return name

    result = {new(name): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise ConversionError(f"Renaming by {dict(prefixes)} gives two tensors one name.")
    return result


def import_params(
    tensors: Tensors, config: ModelConfig, *, suffix: str = "", seed: int = 0
) -> tuple[Any, Report]:
    """Our parameters from an official state dict in either naming.

    Args:
      suffix: '_m' takes the momentum twins; what is left unused is not accounted for then.
      seed: of the parameters that the file does not hold.

    Returns:
      (params, report); ``report.expect()`` raises where something is amiss.

    Raises:
      ConversionError: a tensor's shape does not fit the config, or the official code has no such
        model.
    """
    _check_settings(config)
    plain, notes = fine_tuning_names(tensors)
    report = Report(notes=notes)
    rows = [
        row._replace(name=_twin(row.name, suffix))
        for row in official_rows(config, fusion_layers_of(plain))
    ]
    filling = Filling(config)
    absent = filling.fill(rows, plain, report)
    if not suffix:
        _account_unused(plain, absent, config, report)
    _account_missing(plain, rows, absent, report)
    filling.settle(report, "no official tensor corresponds to it")
    return filling.complete(seed), report


def export_params(
    params: Any, config: ModelConfig, *, fusion_layers: int = RELEASED_FUSION_LAYERS
) -> Arrays:
    """Parameters, or gradients of their shape, under the official fine-tuned names.

    Each array of ours appears once; ``state_dict`` adds what the official modules hold besides.
    """
    return export(official_rows(config, fusion_layers), params, config)


def state_dict(params: Any, config: ModelConfig) -> Arrays:
    """What the official models load (with ``strict=False``): ``export_params`` and tied arrays.

    Raises:
      ConversionError: the official code has no such model.
    """
    _check_settings(config)
    state = export_params(params, config)
    for head, words in TIED:
        if f"{head}bias" in state:
            state[f"{head}decoder.weight"] = state[words]
            state[f"{head}decoder.bias"] = state[f"{head}bias"]
    return state


def _check_settings(config: ModelConfig) -> None:
    ours = fields_of(config)
    odd = [f"model.{n}={ours[n]!r} (theirs: {v!r})" for n, v in SETTINGS.items() if ours[n] != v]
    if odd:
        raise ConversionError(f"The official code has no model with {', '.join(odd)}.")


def _twin(name: str, suffix: str) -> str:
    """'text_encoder_m.…' for 'text_encoder.…'; the temperature has no twin."""
    first, dot, rest = name.partition(".")
    return name if name == "temp" else f"{first}{suffix}{dot}{rest}"


def _account_unused(
    tensors: Tensors, absent: list[Row], config: ModelConfig, report: Report
) -> None:
    first = fusion_layers_of(tensors) - config.fusion.depth
    for name in tensors:
        if name not in report.used and (reason := _tied(name, tensors) or _fusion(name, first)):
            report.unused[name] = reason
    account_unused(report, tensors, [row.name for row in absent], DEAD)


def _fusion(name: str, first_running: int) -> str | None:
    """Why the fusion network never reads one of its tensors, or None."""
    if not (number := re.match(re.escape(FUSION) + r"(\d+)\.", name)):
        return None
    if int(number[1]) < first_running:
        return f"one of the first {first_running} fusion layers, which never run"
    return "a connected layer has no cross-attention" if ".crossattention." in name else None


def _tied(name: str, tensors: Tensors) -> str | None:
    """Why a head's copy of the word embeddings or of its bias is not needed, if it is a copy."""
    for head, words in TIED:
        twins = {f"{head}decoder.weight": words, f"{head}decoder.bias": f"{head}bias"}
        twin = twins.get(name)
        if twin in tensors and np.array_equal(tensors[name], tensors[twin]):
            return f"equal to {twin}, with which it is tied"
    return None


def _account_missing(tensors: Tensors, rows: list[Row], absent: list[Row], report: Report) -> None:
    lost = {(row.path, row.layer) for row in absent}
    reasons = {}
    for pattern, reason in ABSENT:
        group = {(row.path, row.layer) for row in rows if re.search(pattern, row.path)}
        if group <= lost:
            reasons |= dict.fromkeys(group, reason)
    spare = list(report.unexpected) or list(tensors)
    for row in absent:
        key = row.path, row.layer
        if key in reasons:
            report.initial[row.place] = reasons[key]
        else:
            report.missing[row.place] = f" = {row.name}{closest(row.name, spare)}"
