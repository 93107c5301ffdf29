"""Evaluators: run a model over held-out data and return the metrics of the field.

Every process reads the whole held-out set and holds every result; devices share the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.examples import EvalExamples
from mplug_jax.data.pipeline import eval_batches
from mplug_jax.data.records import Source
from mplug_jax.data.sources import build_source
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.evaluation.captions import caption_metrics
from mplug_jax.evaluation.retrieval import retrieval_metrics, scatter_scores, top_k_indices
from mplug_jax.evaluation.scene_captions import attribute_accuracy
from mplug_jax.generation.greedy import greedy
from mplug_jax.models.mplug import MPlug
from mplug_jax.tasks.setup import Setup
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


class HeldOut(NamedTuple):
    """What is evaluated on what.

    Attributes:
      source: the held-out records, one a picture.
      examples: how they become model input.
      mesh: the devices that share the work.
    """

    model: MPlug
    tokenizer: Tokenizer
    source: Source
    examples: EvalExamples
    mesh: Any

    def batches(self, limit: int) -> Iterator[dict[str, np.ndarray]]:
        """The first ``limit`` records, in batches of a size that the mesh divides."""
        return eval_batches(self.source, self.examples, _rows(self.mesh), limit)


class RetrievalEvaluator:
    """Recall of image-text retrieval: ITC similarities, the best re-ranked by the ITM logit.

    Args:
      limit: pictures used.
      rerank: candidates of each query that fusion scores.
      captions: texts of a picture, its first ones; 0 takes all.
    """

    def __init__(self, data: HeldOut, *, limit: int, rerank: int, captions: int):
        self._data, model = data, data.model
        self._limit, self._rerank, self._captions = limit, rerank, captions

        def encode_image(params: Any, batch: Any) -> Any:
            variables = {"params": params}
            embeds = model.apply(variables, batch["image"], method="encode_image")
            return embeds, model.apply(variables, embeds, method="project_image")

        def encode_text(params: Any, batch: Any) -> Any:
            variables = {"params": params}
            embeds = model.apply(variables, batch["ids"], batch["mask"], method="encode_text")
            return embeds, model.apply(variables, embeds, method="project_text")

        def match(params: Any, batch: Any) -> jax.Array:
            variables = {"params": params}
            _, text = model.apply(
                variables, batch["image"], batch["text"], batch["mask"], method="fuse"
            )
            return model.apply(variables, text, method="match")[:, 1]

        out = replicated(data.mesh)
        self._encode_image = jax.jit(encode_image, out_shardings=out)
        self._encode_text = jax.jit(encode_text, out_shardings=out)
        self._match = jax.jit(match, out_shardings=out)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """Metrics ``txt_r1`` ... re-ranked, ``itc_txt_r1`` ... of ITC alone, in percent."""
        image, image_feats, indices = self._images(params)
        ids, mask, owner = self._texts(indices)
        text, text_feats = self._text_features(params, ids, mask)
        similarity = image_feats @ text_feats.T
        own = np.arange(len(indices))
        by_itc = retrieval_metrics(similarity, similarity.T, own, owner)
        texts_of = top_k_indices(similarity, self._rerank)
        images_of = top_k_indices(similarity.T, self._rerank)
        to_text, to_image = self._match_logits(params, image, text, mask, texts_of, images_of)
        image_to_text = scatter_scores(similarity.shape, texts_of, to_text)
        text_to_image = scatter_scores(similarity.T.shape, images_of, to_image)
        metrics = retrieval_metrics(image_to_text, text_to_image, own, owner)
        if samples is not None:
            self._sheet(samples, indices, ids, owner, image_to_text)
        return metrics | {f"itc_{name}": value for name, value in by_itc.items()}

    def _images(self, params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings ``[N, V, D]``, features ``[N, E]`` and source indices ``[N]``."""
        embeds, feats, indices = [], [], []
        for batch in self._data.batches(self._limit):
            placed = place_global_batch({"image": batch["image"]}, self._data.mesh)
            outputs = [np.asarray(x) for x in self._encode_image(params, placed)]
            embeds.append(outputs[0][batch["valid"]])
            feats.append(outputs[1][batch["valid"]])
            indices.append(batch["index"][batch["valid"]])
        return np.concatenate(embeds), np.concatenate(feats), np.concatenate(indices)

    def _texts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and masks ``[M, L]`` of all captions, and for each the row of its picture."""
        data, encoded, owner = self._data, [], []
        for row, index in enumerate(indices):
            captions = data.source[int(index)]["captions"]
            for caption in captions[: self._captions or None]:
                encoded.append(
                    self._data.tokenizer.encode(caption, self._data.examples.text_length)
                )
                owner.append(row)
        ids, mask = (np.stack(part) for part in zip(*encoded, strict=True))
        return ids, mask, np.array(owner)

    def _text_features(
        self, params: Any, ids: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for block in _padded(len(ids), 4 * _rows(self._data.mesh)):
            batch = place_global_batch({"ids": ids[block], "mask": mask[block]}, self._data.mesh)
            parts.append([np.asarray(x) for x in self._encode_text(params, batch)])
        embeds, feats = (np.concatenate(part)[: len(ids)] for part in zip(*parts, strict=True))
        return embeds, feats

    def _match_logits(
        self,
        params: Any,
        image: np.ndarray,
        text: np.ndarray,
        mask: np.ndarray,
        texts_of: np.ndarray,
        images_of: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Match logits of each image's candidate texts and of each text's candidate images."""
        text_rows = np.concatenate(
            [texts_of.ravel(), np.arange(images_of.size) // images_of.shape[1]]
        )
        image_rows = np.concatenate(
            [np.arange(texts_of.size) // texts_of.shape[1], images_of.ravel()]
        )
        # Most pairs are candidates both ways; each is scored once.
        pairs, inverse = np.unique(image_rows * len(text) + text_rows, return_inverse=True)
        logits = []
        for block in _padded(len(pairs), 4 * _rows(self._data.mesh)):
            i, t = np.divmod(pairs[block], len(text))
            batch = {"image": image[i], "text": text[t], "mask": mask[t]}
            logits.append(
                np.asarray(self._match(params, place_global_batch(batch, self._data.mesh)))
            )
        values = np.concatenate(logits)[: len(pairs)][inverse]
        to_text, to_image = np.split(values, [texts_of.size])
        return to_text.reshape(texts_of.shape), to_image.reshape(images_of.shape)

    def _sheet(
        self,
        folder: Path,
        indices: np.ndarray,
        ids: np.ndarray,
        owner: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Pictures with the text ranked first for each."""
        data, count = self._data, min(SHEET_ROWS, len(scores))
        best = scores[:count].argmax(axis=1)
        texts = [data.tokenizer.decode(ids[i][1:]) for i in best]
        images = [data.examples(data.source[int(indices[i])])["image"] for i in range(count)]
        right = [bool(owner[best[i]] == i) for i in range(count)]
        sample_sheet(folder / "retrieval.png", np.stack(images), texts, ok=right)


class CaptionEvaluator:
    """Greedy captions from the empty prefix; attribute accuracy where the source has layouts.

    Args:
      limit: pictures captioned; max_length: tokens of a caption.
    """

    def __init__(self, data: HeldOut, *, limit: int, max_length: int):
        self._data, self._limit = data, limit
        model, tokenizer = data.model, data.tokenizer

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

        self._caption = jax.jit(caption, out_shardings=replicated(data.mesh))

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """Fractions ``attribute_accuracy`` ... for scenes; ``cider`` and its like for others."""
        captions: list[str] = []
        indices: list[int] = []
        shown: list[np.ndarray] = []
        for batch in self._data.batches(self._limit):
            image = place_global_batch({"image": batch["image"]}, self._data.mesh)["image"]
            ids = np.asarray(self._caption(params, image))
            for row in np.flatnonzero(batch["valid"]):
                captions.append(self._data.tokenizer.decode(ids[row]))
                indices.append(int(batch["index"][row]))
                if len(shown) < SHEET_ROWS:
                    shown.append(batch["image"][row])
        right: list[bool | None] = [None] * len(shown)
        source = self._data.source
        if hasattr(source, "layout"):
            layouts = [source.layout(i) for i in indices]
            metrics = attribute_accuracy(layouts, captions)
            right = [
                bool(attribute_accuracy([layouts[i]], [captions[i]])["attribute_accuracy"])
                for i in range(len(shown))
            ]
        else:
            references = {i: source[i]["captions"] for i in indices}
            said = dict(zip(indices, captions, strict=True))
            metrics = caption_metrics(said, references, java=False)
            metrics["words"] = float(np.mean([len(caption.split()) for caption in captions]))
        if samples is not None:
            self._write(samples, indices, captions)
            sample_sheet(
                samples / "captions.png", np.stack(shown), captions[: len(shown)], ok=right
            )
        return metrics

    def _write(self, folder: Path, indices: list[int], captions: list[str]) -> None:
        """``captions.json``, in the format of COCO's caption evaluation, ids as strings."""
        folder.mkdir(parents=True, exist_ok=True)
        ids = [self._data.source[i]["id"] for i in indices]
        lines = [{"image_id": i, "caption": c} for i, c in zip(ids, captions, strict=True)]
        (folder / "captions.json").write_text(json.dumps(lines, indent=1, ensure_ascii=False))


EVALUATORS = {"retrieval": RetrievalEvaluator, "caption": CaptionEvaluator}


def build_evaluators(setup: Setup, mesh: Any) -> dict[str, Any]:
    """The evaluators of ``config.evals`` by name: callables (params, folder or None) -> metrics."""
    config, built = setup.config, {}
    transform = ImageTransform(setup.image_size, train=False)
    examples = EvalExamples(setup.tokenizer, transform, config.data.text_length)
    for name, settings in config.evals.items():
        source = build_source(
            settings.source, config.data.root, config.seed, config.data.max_bad_fraction
        )
        options = {k: v for k, v in settings.items() if k not in ("kind", "source")}
        data = HeldOut(setup.model, setup.tokenizer, source, examples, mesh)
        built[name] = EVALUATORS[settings.kind](data, **options)
    return built
