"""Whether pictures and texts belong together, and which of many fits best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import decode_image
from mplug_jax.prediction.model import Model, PredictionError

# Rows of a compiled batch; the best by similarity that fusion judges too.
ROWS = 16


class Match(NamedTuple):
    """How well a picture and a text fit.

    Attributes:
      item: the text, or the picture's path, that was compared.
      probability: of a match, by the ITM head; None where the model was trained without it.
      similarity: cosine of the ITC features, in -1..1.
    """

    item: str
    probability: float | None
    similarity: float


class Matcher:
    """Compares pictures with texts."""

    def __init__(self, model: Model):
        self._model = model
        self.fuses = model.setup.config.objectives.itm.weight > 0

        @jax.jit
        def image_features(params: Any, image: jax.Array) -> jax.Array:
            forward = model.forward(params)
            return forward("project_image", forward("encode_image", image))

        @jax.jit
        def text_features(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            forward = model.forward(params)
            return forward("project_text", forward("encode_text", ids, mask))

        @jax.jit
        def probability(params: Any, image: Any, ids: Any, mask: Any, index: Any) -> jax.Array:
            forward = model.forward(params)
            images, texts = forward("encode_image", image), forward("encode_text", ids, mask)
            fused = forward("fuse_text", images, texts, mask, index)
            return jax.nn.softmax(forward("match", fused))[:, 1]

        self._image_features, self._text_features = image_features, text_features
        self._probability = probability

    def texts(self, pixels: np.ndarray, texts: Sequence[str]) -> list[Match]:
        """How well each text fits a picture ``[h, w, 3]``, in the order of the texts."""
        image = self._model.picture(pixels)[None]
        similarity = (
            self._text_feats(texts) @ np.asarray(self._image_features(self._model.params, image))[0]
        )
        return self._judged(texts, similarity, self._of_texts(image, texts))

    def best_texts(self, pixels: np.ndarray, texts: Sequence[str], top: int) -> list[Match]:
        """The ``top`` texts for a picture; the likeliest ``ROWS`` or more are judged by fusion."""
        image = self._model.picture(pixels)[None]
        feats = np.asarray(self._image_features(self._model.params, image))[0]
        similarity = self._text_feats(texts) @ feats
        near = _nearest(similarity, top)
        chosen = [texts[place] for place in near]
        return _best(self._judged(chosen, similarity[near], self._of_texts(image, chosen)), top)

    def best_pictures(
        self, text: str, paths: Sequence[str], top: int
    ) -> tuple[list[Match], list[str]]:
        """The ``top`` pictures for a text, and what is wrong with those that could not be read.

        Raises:
          PredictionError: none can be read.
        """
        usable, feats, problems = [], [], []
        for block in _blocks(paths):
            read, pictures = [], []
            for path in block:
                try:
                    pictures.append(self._model.picture(decode_image(path)))
                    read.append(path)
                except BadSample as error:
                    problems.append(str(error))
            if read:
                made = self._image_features(self._model.params, _filled(np.stack(pictures)))
                feats.append(np.asarray(made)[: len(read)])
                usable += read
        if not usable:
            raise PredictionError(f"None of the pictures can be read: {problems[0]}")
        similarity = np.concatenate(feats) @ self._text_feats([text])[0]
        near = _nearest(similarity, top)
        chosen = [usable[place] for place in near]
        judged = self._judged(chosen, similarity[near], self._of_pictures(text, chosen))
        return _best(judged, top), problems

    def _judged(
        self, items: Sequence[str], similarity: np.ndarray, probabilities: Iterator[float]
    ) -> list[Match]:
        given = probabilities if self.fuses else iter([None] * len(items))
        return [Match(*row) for row in zip(items, given, map(float, similarity), strict=True)]

    def _text_feats(self, texts: Sequence[str]) -> np.ndarray:
        feats = []
        for block in _blocks(texts):
            ids, mask = map(_filled, self._model.texts(list(block)))
            feats.append(
                np.asarray(self._text_features(self._model.params, ids, mask))[: len(block)]
            )
        return np.concatenate(feats)

    def _of_texts(self, image: np.ndarray, texts: Sequence[str]) -> Iterator[float]:
        """Probabilities of a picture ``[1, H, W, 3]`` with each text."""
        for block in _blocks(texts):
            ids, mask = map(_filled, self._model.texts(list(block)))
            index = np.zeros(ROWS, np.int32)
            found = self._probability(self._model.params, image, ids, mask, index)
            yield from np.asarray(found)[: len(block)].tolist()

    def _of_pictures(self, text: str, paths: Sequence[str]) -> Iterator[float]:
        """Probabilities of a text with each picture."""
        ids, mask = map(_filled, self._model.texts([text]))
        for block in _blocks(paths):
            images = _filled(np.stack([self._model.picture(decode_image(path)) for path in block]))
            index = np.arange(ROWS, dtype=np.int32)
            found = self._probability(self._model.params, images, ids, mask, index)
            yield from np.asarray(found)[: len(block)].tolist()


def _blocks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[start : start + ROWS] for start in range(0, len(items), ROWS))


def _filled(rows: np.ndarray) -> np.ndarray:
    """``ROWS`` rows, the first one repeated for those that are missing."""
    return np.concatenate([rows, np.repeat(rows[:1], ROWS - len(rows), axis=0)])


def _nearest(similarity: np.ndarray, top: int) -> np.ndarray:
    return np.argsort(-similarity, kind="stable")[: max(top, ROWS)]


def _best(matches: list[Match], top: int) -> list[Match]:
    """By probability, else by similarity."""
    return sorted(
        matches,
        key=lambda m: -(m.similarity if m.probability is None else m.probability),
    )[:top]
