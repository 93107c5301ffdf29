"""Image-text retrieval, of pictures and of clips, in two stages.

ITC similarities rank everything; the best candidates of each query are ranked again by fusion.
Only one block of pictures is held as tokens at a time: those of a whole test set would not fit
(5,000 pictures of 577 tokens take 9 GB), so a picture is encoded once for each stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.examples import EvalExamples
from mplug_jax.data.pipeline import eval_batches
from mplug_jax.evaluation.retrieval import (
    median_rank,
    reranked_scores,
    retrieval_metrics,
    top_k_indices,
)
from mplug_jax.tasks.evaluators.held_out import (
    BATCH_SIZE,
    SHEET_ROWS,
    HeldOut,
    Sheet,
    write_json,
)

SCORES = ("itm", "itm+sim", "itm+itc")
# Pictures held as tokens; texts encoded, or pairs fused, at once.
BLOCK = 16
PAIRS = 4 * BATCH_SIZE
# Of each query in the file of results.
SHOWN = 10


class _Texts(NamedTuple):
    """All captions: host arrays, and what the model makes of them.

    Attributes:
      pictures: names of the N pictures; said: the M captions as they were read.
      ids: ``[M, L]``; owner: ``[M]``, the row of each text's picture; feats: ``[M, E]``.
      embeds, device_mask: ``[M', L, ...]`` on every device, padded at the end.
    """

    pictures: list[str]
    said: list[str]
    ids: np.ndarray
    owner: np.ndarray
    feats: np.ndarray
    embeds: jax.Array
    device_mask: jax.Array


class RetrievalEvaluator:
    """Recall of image-text retrieval: ITC similarities, the best re-ranked by fusion.

    Args:
      limit: pictures used; 0 takes all.
      rerank: candidates of each query that fusion scores.
      captions: texts of a picture, its first ones; 0 takes all.
      score: of a pair that fusion has seen. 'itm': its match logit. 'itm+sim': the logit and the
        similarity together, as in the official video retrieval. 'itm+itc': the log odds of a match
        and the similarity over the temperature. Hard negatives are drawn by the softmax of the
        latter, so the odds that a matcher learns from them are those of the pair against what ITC
        would draw, P(text | image) / P_ITC(text | image): noise-contrastive estimation (Gutmann
        and Hyvärinen 2010) with ITC as the noise. The sum is log P up to a constant.

    Raises:
      ValueError: another score.
    """

    def __init__(self, data: HeldOut, *, limit: int, rerank: int, captions: int, score: str):
        if score not in SCORES:
            raise ValueError(f"retrieval score {score!r} is unknown; choose {', '.join(SCORES)}.")
        self._data, self._score = data, score
        self._limit, self._rerank, self._captions = limit, rerank, captions
        setup = data.setup
        self._examples = EvalExamples(
            setup.tokenizer,
            data.transform,
            setup.config.data.text_length,
            frames=setup.model_config.frames,
        )

        def image_features(params: Any, batch: Any) -> jax.Array:
            forward = data.forward(params)
            return forward("project_image", forward("encode_image", batch["image"]))

        def encode_image(params: Any, batch: Any) -> jax.Array:
            return data.forward(params)("encode_image", batch["image"])

        def encode_text(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            forward = data.forward(params)
            embeds = forward("encode_text", batch["ids"], batch["mask"])
            return embeds, forward("project_text", embeds)

        def match(params: Any, images: Any, texts: Any, mask: Any, pairs: Any) -> jax.Array:
            forward, chosen = data.forward(params), pairs["text"]
            fused = forward("fuse_text", images, texts[chosen], mask[chosen], pairs["image"])
            logits = forward("match", fused)
            if score != "itm+itc":
                return logits[:, 1]
            return logits[:, 1] - logits[:, 0]

        def temperature(params: Any) -> jax.Array:
            return data.forward(params)("temperature")

        self._image_features = data.compiled(image_features)
        self._encode_image = data.compiled(encode_image)
        self._encode_text = data.compiled(encode_text)
        self._match = data.compiled(match)
        self._temperature = data.compiled(temperature)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """Metrics ``txt_r1`` ... re-ranked, ``itc_txt_r1`` ... of ITC alone, in percent, and the
        median ranks ``txt_medr`` and ``img_medr`` after re-ranking, ITC's beyond it."""
        feats, indices = self._pictures(params)
        texts = self._encoded_texts(params, indices)
        similarity = feats @ texts.feats.T
        own, owner = np.arange(len(indices)), texts.owner
        by_itc = retrieval_metrics(similarity, similarity.T, own, owner)
        texts_of = top_k_indices(similarity, self._rerank)
        images_of = top_k_indices(similarity.T, self._rerank)
        to_text, to_image = self._pair_scores(params, texts, similarity, texts_of, images_of)
        image_to_text = reranked_scores(similarity, texts_of, to_text)
        text_to_image = reranked_scores(similarity.T, images_of, to_image)
        metrics = retrieval_metrics(image_to_text, text_to_image, own, owner)
        metrics["txt_medr"] = median_rank(image_to_text, query_ids=own, gallery_ids=owner)
        metrics["img_medr"] = median_rank(text_to_image, query_ids=owner, gallery_ids=own)
        if samples is not None:
            _write(samples, texts, image_to_text, text_to_image)
            self._sheet(samples, indices, texts, image_to_text)
        return metrics | {f"itc_{name}": value for name, value in by_itc.items()}

    def _pictures(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features ``[N, E]`` and places in the source ``[N]``."""
        rows = self._data.each(
            self._image_features, params, self._examples, ("image",), limit=self._limit
        )
        indices, feats = zip(*((index, feats) for index, _, feats in rows), strict=True)
        return np.stack(feats), np.array(indices)

    def _encoded_texts(self, params: Any, indices: np.ndarray) -> _Texts:
        data, pictures, said, owner = self._data, [], [], []
        for row, index in enumerate(indices):
            record = data.source[int(index)]
            captions = record["captions"][: self._captions or None]
            pictures.append(record["id"])
            said += captions
            owner += [row] * len(captions)
        length = self._examples.text_length
        encoded = (data.setup.tokenizer.encode(caption, length) for caption in said)
        ids, mask = (np.stack(part) for part in zip(*encoded, strict=True))
        embeds, feats, masks = [], [], []
        for block in _padded(len(ids), data.rows(PAIRS)):
            batch = data.place({"ids": ids[block], "mask": mask[block]})
            made, features = self._encode_text(params, batch)
            embeds.append(made)
            feats.append(np.asarray(features))
            masks.append(mask[block])
        return _Texts(
            pictures,
            said,
            ids,
            np.array(owner),
            np.concatenate(feats)[: len(ids)],
            jnp.concatenate(embeds),
            jnp.asarray(np.concatenate(masks)),
        )

    def _pair_scores(
        self,
        params: Any,
        texts: _Texts,
        similarity: np.ndarray,
        texts_of: np.ndarray,
        images_of: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of each picture's candidate texts and of each text's candidate pictures."""
        count = len(texts.ids)
        text_rows = np.concatenate([texts_of.ravel(), _row_of(images_of)])
        image_rows = np.concatenate([_row_of(texts_of), images_of.ravel()])
        # Most pairs are candidates both ways; each is scored once. Sorted, so by picture.
        pairs, inverse = np.unique(image_rows * count + text_rows, return_inverse=True)
        scores = np.concatenate(list(self._match_logits(params, texts, pairs)))
        if self._score != "itm":
            scale = 1.0 if self._score == "itm+sim" else float(self._temperature(params))
            scores = scores + similarity.ravel()[pairs] / scale
        to_text, to_image = np.split(scores[inverse], [texts_of.size])
        return to_text.reshape(texts_of.shape), to_image.reshape(images_of.shape)

    def _match_logits(self, params: Any, texts: _Texts, pairs: np.ndarray) -> Iterator[np.ndarray]:
        """Match logits of the sorted ``pairs`` (picture row x number of texts + text), by block."""
        data, done = self._data, 0
        rows, size = data.rows(BLOCK), data.rows(PAIRS)
        for batch in eval_batches(data.source, self._examples, rows, self._limit or None):
            places = np.flatnonzero(batch["valid"])
            bounds = np.array([done, done + len(places)]) * len(texts.ids)
            low, high = np.searchsorted(pairs, bounds)
            image, text = np.divmod(pairs[low:high], len(texts.ids))
            local = places[image - done]
            done += len(places)
            if low == high:
                continue
            embeds = self._encode_image(params, data.place({"image": batch["image"]}))
            logits = []
            for block in _padded(high - low, size):
                chosen = data.place({"image": local[block], "text": text[block]})
                logits.append(self._match(params, embeds, texts.embeds, texts.device_mask, chosen))
            yield np.concatenate([np.asarray(x) for x in logits])[: high - low]

    def _sheet(self, folder: Path, indices: np.ndarray, texts: _Texts, scores: np.ndarray) -> None:
        """Pictures with the text ranked first for each."""
        data, sheet = self._data, Sheet()
        for row, index in enumerate(indices[:SHEET_ROWS]):
            best = int(scores[row].argmax())
            example = self._examples(data.source[int(index)])
            title = data.setup.tokenizer.decode(texts.ids[best][1:])
            sheet.add(example, title, bool(texts.owner[best] == row))
        sheet.write(folder / "retrieval.png")


def _write(
    folder: Path, texts: _Texts, image_to_text: np.ndarray, text_to_image: np.ndarray
) -> None:
    """The best ``SHOWN`` of each query: texts by picture, pictures by text, from the first."""
    best_texts, best_pictures = (
        top_k_indices(scores, SHOWN) for scores in (image_to_text, text_to_image)
    )
    rows = [
        {"picture": name, "texts": [texts.said[place] for place in best]}
        for name, best in zip(texts.pictures, best_texts, strict=True)
    ]
    rows += [
        {"text": caption, "pictures": [texts.pictures[place] for place in best]}
        for caption, best in zip(texts.said, best_pictures, strict=True)
    ]
    write_json(folder / "retrieval.json", rows)


def _padded(count: int, rows: int) -> Iterator[np.ndarray]:
    """Index blocks of exactly ``rows``, the last one filled by repeating its first index."""
    for start in range(0, count, rows):
        block = np.arange(start, min(start + rows, count))
        yield np.concatenate([block, np.full(rows - len(block), block[0])])


def _row_of(candidates: np.ndarray) -> np.ndarray:
    """The query of each of ``candidates [N, k]``, flattened."""
    return np.repeat(np.arange(len(candidates)), candidates.shape[1])
