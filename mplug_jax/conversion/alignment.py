"""Where fusion begins between two towers that have never met: picture tokens as further words.

A fusion network from BERT's layers can attend over words; an image encoder's tokens lie in a space
of their own, often with a few channels and directions far larger than all others (of DINOv2
ViT-S/14 one direction has 41 % of the variance), and attention over them has to be learnt from
nothing. So

1. the bridge between the two starts as the rotation of whitened picture tokens to whitened words
   under which pictures and their captions agree best (orthogonal Procrustes; Schönemann 1966), in
   the scale of the words: nothing the tokens hold is lost, and what pictures and captions share
   lies in the same direction in both;
2. every cross-attention starts from the same layer's self-attention (Rothe et al. 2020,
   "Leveraging pre-trained checkpoints for sequence generation tasks", section 2), which now finds
   something it knows.

The official code has neither.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mplug_jax.conversion.report import ConversionError, Report
from mplug_jax.data.examples import PretrainExamples
from mplug_jax.data.pipeline import eval_batches
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.text_encoder import TextEncoder
from mplug_jax.models.vit import ViT
from mplug_jax.tasks.setup import Setup, prepare

BATCH_SIZE = 64
SHRINKAGE = 0.1  # of the mean variance, added to each: directions without any stay small


class Alignment(NamedTuple):
    """The bridge: ``words = normalised(tokens @ kernel + bias) * scale``.

    Attributes:
      kernel: ``[V, D]``; bias ``[D]``; scale: root mean square of the words.
      agreement: cosine between the whitened means of a picture's tokens, rotated, and of its
        caption's words, averaged over the pairs.
    """

    kernel: np.ndarray
    bias: np.ndarray
    scale: float
    agreement: float


def align_towers(params: Any, config: ConfigDict, model: ModelConfig, pairs: int, out: str) -> str:
    """Fills bridge and cross-attention of ``params`` in place, from both towers there.

    Args:
      config: names the training data; its first ``pairs`` pictures with a caption each are read.
      out: folder for what the data need to keep (a tokenizer that is trained).

    Returns:
      a line that says what was measured.

    Raises:
      ConversionError: the config has no bridge or no data; ConfigError, SourceError: as training.
    """
    if "bridge" not in params:
        raise ConversionError(
            "--align fills the bridge between image encoder and fusion, which this config has not: "
            "add --config.model.bridge=True."
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.cached_variants = 0
    setup = prepare(config, out)
    if not setup.sources:
        raise ConversionError("--align reads pairs of config.data.train, and the config has none.")
    images, texts, mask = encode_pairs(params, setup, model, pairs)
    alignment = procrustes(images, texts, mask)
    bridge = params["bridge"]
    bridge["dense"] = {"kernel": alignment.kernel, "bias": alignment.bias}
    bridge["layer_norm"]["scale"] = np.full_like(alignment.bias, alignment.scale)
    for layer in (*params["fusion"].values(), params["decoder"]["blocks"]):
        if "cross_attention" in layer:
            for cross, own in (
                ("cross_attention", "attention"),
                ("after_cross_attention", "after_attention"),
            ):
                layer[cross] = jax.tree.map(np.copy, layer[own])
    return (
        f"aligned by {len(images)} pairs: cosine {alignment.agreement:.3f} between a picture's and "
        "its caption's means; cross-attention from self-attention"
    )


def account(report: Report, note: str) -> None:
    """Tells the report what ``align_towers`` has made of parameters that no file gave."""
    report.notes.append(note)
    for path in report.initial:
        if path.startswith("bridge/"):
            report.initial[path] = "set by --align"
        elif re.search("/(after_)?cross_attention/", path):
            report.initial[path] = "by --align a copy of the layer's self-attention"


def encode_pairs(
    params: Any, setup: Setup, model: ModelConfig, pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch tokens ``[N, P, V]``, words ``[N, L, D]`` and their mask of pictures and a caption."""
    data, source = setup.config.data, setup.sources[0][0]
    transform = ImageTransform(model.vision.image_size, train=False)
    examples = PretrainExamples(
        setup.tokenizer, transform, data.text_length, data.target_length, 0.0, model.frames
    )
    vit, encoder = ViT(model.vision, model.compute_dtype), TextEncoder(model.text)

    @jax.jit
    def encode(eye: Any, reader: Any, image: Any, ids: Any, mask: Any) -> Any:
        tokens = vit.apply({"params": eye}, image.reshape(-1, *image.shape[-3:]))[:, 1:]
        tokens = tokens.reshape(len(image), -1, tokens.shape[-1])
        return tokens, encoder.apply({"params": reader}, ids, mask)

    parts: list[tuple[np.ndarray, ...]] = []
    for batch in eval_batches(source, examples, BATCH_SIZE, limit=pairs):
        valid, mask = batch["valid"], batch["text_mask"]
        encoded = encode(
            params["visual_encoder"],
            params["text_encoder"],
            batch["image"],
            batch["text_ids"],
            mask,
        )
        parts.append(tuple(np.asarray(x, np.float32)[valid] for x in (*encoded, mask)))
    images, texts, mask = (np.concatenate(x) for x in zip(*parts, strict=True))
    return images, texts, mask.astype(bool)


def procrustes(images: np.ndarray, texts: np.ndarray, mask: np.ndarray) -> Alignment:
    """The alignment of picture tokens ``[N, P, V]`` with words ``[N, L, D]`` under ``mask``.

    V may differ from D: of the larger space, what the two share least is then left out, or empty.
    """
    tokens, words = images.reshape(-1, images.shape[-1]), texts[mask]
    token_mean, word_mean = tokens.mean(axis=0), words.mean(axis=0)
    whiten_tokens = _power(_covariance(tokens), -0.5, SHRINKAGE)
    word_covariance = _covariance(words)
    shown = (images.mean(axis=1) - token_mean) @ whiten_tokens
    weights = mask / mask.sum(axis=1, keepdims=True)
    told = np.einsum("nl,nld->nd", weights, texts) - word_mean
    told = told @ _power(word_covariance, -0.5, SHRINKAGE)
    shown, told = shown - shown.mean(axis=0), told - told.mean(axis=0)
    left, _, right = np.linalg.svd(shown.T @ told, full_matrices=False)
    rotation = left @ right
    kernel = whiten_tokens @ rotation @ _power(word_covariance, 0.5, 0.0)
    cosine = np.sum(shown @ rotation * told, axis=1)
    cosine /= np.linalg.norm(shown @ rotation, axis=1) * np.linalg.norm(told, axis=1) + 1e-12
    return Alignment(
        kernel.astype(np.float32),
        (word_mean - token_mean @ kernel).astype(np.float32),
        float(np.sqrt(np.mean(words**2))),
        float(cosine.mean()),
    )


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.cov(x, rowvar=False).astype(np.float64)


def _power(covariance: np.ndarray, exponent: float, shrinkage: float) -> np.ndarray:
    """A power of a covariance, its variances raised by ``shrinkage`` times their mean."""
    variances, axes = np.linalg.eigh(covariance)
    variances = np.maximum(variances, 0.0) + shrinkage * variances.mean()
    return axes * np.maximum(variances, np.finfo(np.float32).tiny) ** exponent @ axes.T
