"""Evaluators: run a model over held-out data and return the metrics of the field.

Every process reads the whole held-out set and holds every result; devices share the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.examples import EvalExamples
from mplug_jax.data.pipeline import eval_batches
from mplug_jax.data.records import Source
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.evaluation.retrieval import retrieval_metrics, scatter_scores, top_k_indices
from mplug_jax.evaluation.scene_captions import attribute_accuracy
from mplug_jax.generation.greedy import greedy
from mplug_jax.models.mplug import MPlug
from mplug_jax.training.reports import sample_sheet
from mplug_jax.training.sharding import place_global_batch, replicated

BATCH_SIZE = 64
SHEET_ROWS = 16


def _rows(mesh: Any) -> int:
    """Rows of an evaluation batch: about BATCH_SIZE, and a multiple of the data axis."""
    parts = mesh.shape["data"]
    return -(-BATCH_SIZE // parts) * parts


def _padded(count: int, rows: int) -> Iterator[np.ndarray]:
    """Index blocks of exactly ``rows``, the last one filled by repeating its first index."""
    for start in range(0, count, rows):
        block = np.arange(start, min(start + rows, count))
        yield np.concatenate([block, np.full(rows - len(block), block[0])])


class RetrievalEvaluator:
    """Recall of image-text retrieval: ITC similarities, the best re-ranked by the ITM logit.

    Args:
      source: one record a picture; its first caption is the text.
      limit: pictures used; rerank: candidates of each query that fusion scores.
    """

    def __init__(
        self,
        model: MPlug,
        tokenizer: Tokenizer,
        source: Source,
        examples: EvalExamples,
        mesh: Any,
        *,
        limit: int,
        rerank: int,
    ):
        self._tokenizer, self._source, self._examples, self._mesh = (
            tokenizer,
            source,
            examples,
            mesh,
        )
        self._limit, self._rerank = limit, rerank
        out = replicated(mesh)

        def encode(params: Any, batch: Any) -> Any:
            variables = {"params": params}
            image = model.apply(variables, batch["image"], method="encode_image")
            text = model.apply(
                variables, batch["text_ids"], batch["text_mask"], method="encode_text"
            )
            return {
                "image": image,
                "text": text,
                "image_feats": model.apply(variables, image, method="project_image"),
                "text_feats": model.apply(variables, text, method="project_text"),
            }

        def match(params: Any, batch: Any) -> jax.Array:
            variables = {"params": params}
            _, text = model.apply(
                variables, batch["image"], batch["text"], batch["text_mask"], method="fuse"
            )
            logits = model.apply(variables, text, method="match")
            return logits[:, 1]

        self._encode = jax.jit(encode, out_shardings=out)
        self._match = jax.jit(match, out_shardings=out)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """Metrics ``txt_r1`` ... re-ranked, ``itc_txt_r1`` ... of ITC alone, in percent."""
        encoded = self._encoded(params)
        similarity = encoded["image_feats"] @ encoded["text_feats"].T
        ids = encoded["image_id"]
        by_itc = retrieval_metrics(similarity, similarity.T, ids, ids)
        texts_of = top_k_indices(similarity, self._rerank)
        images_of = top_k_indices(similarity.T, self._rerank)
        logits = self._match_logits(params, encoded, texts_of, images_of)
        image_to_text = scatter_scores(
            similarity.shape, texts_of, logits[: texts_of.size].reshape(texts_of.shape)
        )
        text_to_image = scatter_scores(
            similarity.T.shape, images_of, logits[texts_of.size :].reshape(images_of.shape)
        )
        metrics = retrieval_metrics(image_to_text, text_to_image, ids, ids)
        if samples is not None:
            self._sheet(samples, encoded, image_to_text)
        return metrics | {f"itc_{name}": value for name, value in by_itc.items()}

    def _encoded(self, params: Any) -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(self._source, self._examples, _rows(self._mesh), self._limit):
            outputs = self._encode(params, place_global_batch(batch, self._mesh))
            keep = batch["valid"]
            rows = {name: np.asarray(value)[keep] for name, value in outputs.items()}
            rows |= {n: batch[n][keep] for n in ("text_ids", "text_mask", "image_id", "index")}
            parts.append(rows)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _match_logits(
        self, params: Any, encoded: dict[str, np.ndarray], texts_of: Any, images_of: Any
    ) -> np.ndarray:
        """Match logits of all candidate pairs: those of each image, then those of each text."""
        count = len(texts_of)
        image_rows = np.concatenate([np.repeat(np.arange(count), texts_of.shape[1]), images_of.ravel()])
        text_rows = np.concatenate([texts_of.ravel(), np.repeat(np.arange(count), images_of.shape[1])])
        # Most pairs are candidates both ways; each is scored once.
        pairs, inverse = np.unique(image_rows * count + text_rows, return_inverse=True)
        logits = []
        for block in _padded(len(pairs), 4 * _rows(self._mesh)):
            image, text = np.divmod(pairs[block], count)
            batch = {
                "image": encoded["image"][image],
                "text": encoded["text"][text],
                "text_mask": encoded["text_mask"][text],
            }
            logits.append(np.asarray(self._match(params, place_global_batch(batch, self._mesh))))
        return np.concatenate(logits)[: len(pairs)][inverse]

    def _sheet(self, folder: Path, encoded: dict[str, np.ndarray], scores: np.ndarray) -> None:
        """Pictures with the text ranked first for each."""
        count = min(SHEET_ROWS, len(scores))
        best = scores[:count].argmax(axis=1)
        texts = [self._tokenizer.decode(encoded["text_ids"][i][1:]) for i in best]
        images = [
            self._examples(self._source[int(encoded["index"][i])])["image"] for i in range(count)
        ]
        right = [bool(best[i] == i) for i in range(count)]
        sample_sheet(folder / "retrieval.png", np.stack(images), texts, ok=right)


class CaptionEvaluator:
    """Greedy captions from the empty prefix; attribute accuracy where the source has layouts.

    Args:
      limit: pictures captioned; max_length: tokens of a caption.
    """

    def __init__(
        self,
        model: MPlug,
        tokenizer: Tokenizer,
        source: Source,
        examples: EvalExamples,
        mesh: Any,
        *,
        limit: int,
        max_length: int,
    ):
        self._tokenizer, self._source, self._examples, self._mesh = (
            tokenizer,
            source,
            examples,
            mesh,
        )
        self._limit = limit

        def caption(params: Any, image: jax.Array) -> jax.Array:
            variables = {"params": params}
            empty = jnp.array([[tokenizer.cls_id, tokenizer.sep_id]])
            ids = jnp.broadcast_to(empty, (image.shape[0], 2))
            mask = jnp.ones(ids.shape, bool)
            fused = model.apply(
                variables,
                model.apply(variables, image, method="encode_image"),
                model.apply(variables, ids, mask, method="encode_text"),
                mask,
                method="fuse",
            )
            memory, memory_mask = model.apply(variables, *fused, mask, method="memory")
            return greedy(
                model,
                params,
                memory,
                memory_mask,
                cls_id=tokenizer.cls_id,
                sep_id=tokenizer.sep_id,
                pad_id=tokenizer.pad_id,
                max_length=max_length,
            )

        self._caption = jax.jit(caption, out_shardings=replicated(mesh))

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """Fractions ``attribute_accuracy`` ... for scenes; the mean length in words for others."""
        captions: list[str] = []
        indices: list[int] = []
        shown: list[np.ndarray] = []
        for batch in eval_batches(self._source, self._examples, _rows(self._mesh), self._limit):
            image = place_global_batch({"image": batch["image"]}, self._mesh)["image"]
            ids = np.asarray(self._caption(params, image))
            for row in np.flatnonzero(batch["valid"]):
                captions.append(self._tokenizer.decode(ids[row]))
                indices.append(int(batch["index"][row]))
                if len(shown) < SHEET_ROWS:
                    shown.append(batch["image"][row])
        right: list[bool | None] = [None] * len(shown)
        metrics = {"words": float(np.mean([len(caption.split()) for caption in captions]))}
        if hasattr(self._source, "layout"):
            layouts = [self._source.layout(i) for i in indices]
            metrics |= attribute_accuracy(layouts, captions)
            right = [
                bool(attribute_accuracy([layouts[i]], [captions[i]])["attribute_accuracy"])
                for i in range(len(shown))
            ]
        if samples is not None:
            sample_sheet(samples / "captions.png", np.stack(shown), captions[: len(shown)], ok=right)
        return metrics
