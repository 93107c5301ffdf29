"""What does a model reach that has seen the training data's texts and boxes but no picture?

    python benchmarks/trivial.py --config=configs/photo_tasks.py:vqa --config.data.root=<folder>

Reads the config's first training source and the held-out set of its evaluator and scores what is
most common in training: the most frequent answer, the mean box, or the most frequent words. Of
boxes the whole picture, too, as many objects fill half of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mplug_jax.data.items import Items
from mplug_jax.data.records import Source
from mplug_jax.data.sources import MIXTURE_KEYS, build_source
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.evaluation.captions import caption_metrics
from mplug_jax.evaluation.grounding import grounding_metrics
from mplug_jax.evaluation.vqa import exact_match
from mplug_jax.tasks.evaluators.vqa import most_frequent

DRAWN = 5_000  # items of drawn scenes, of which there are as many as one wants
Found = tuple[str, Mapping[str, float]]  # what is said of everything, and its figures

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of a fine-tuning.")
flags.mark_flag_as_required("config")


def answers(train: Items, held_out: Items) -> Found:
    """The answer of most training questions."""
    counts = Counter(most_frequent(train[i]["questions"][0]) for i in range(len(train)))
    said = counts.most_common(1)[0][0]
    right = {i: most_frequent(held_out[i]["questions"][0]) for i in range(len(held_out))}
    return repr(said), exact_match(dict.fromkeys(right, said), right)


def boxes(train: Items, held_out: Items) -> Found:
    """The mean of the corners of all boxes."""
    mean = np.mean([train[i]["phrases"][0]["box"] for i in range(len(train))], axis=0)
    return _one_box(mean, held_out)


def whole(_: Items, held_out: Items) -> Found:
    """The picture's own corners."""
    return _one_box(np.array([0.0, 0.0, 1.0, 1.0]), held_out)


def _one_box(box: np.ndarray, held_out: Items) -> Found:
    right = {i: held_out[i]["phrases"][0]["box"] for i in range(len(held_out))}
    return str(box.round(3).tolist()), grounding_metrics(dict.fromkeys(right, box), right)


def captions(train: Items, held_out: Items) -> Found:
    """As many of the most frequent words as a caption most often has, the commonest first."""
    texts = [train[i]["captions"][0].lower().split() for i in range(len(train))]
    ((length, _),) = Counter(map(len, texts)).most_common(1)
    words = Counter(word for text in texts for word in text)
    said = " ".join(word for word, _ in words.most_common(length))
    right: dict[int, list[str]] = {}
    for i, (picture, _) in enumerate(held_out.places):
        right.setdefault(picture, []).extend(held_out[i]["captions"])
    return repr(said), caption_metrics(dict.fromkeys(right, said), right, java=False)


KINDS: dict[str, tuple[str, tuple[Callable[[Items, Items], Found], ...]]] = {
    "vqa": ("questions", (answers,)),
    "grounding": ("phrases", (boxes, whole)),
    "caption": ("captions", (captions,)),
}


def _alone(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A training source without what is said of it as part of a mixture."""
    return {key: value for key, value in spec.items() if key not in MIXTURE_KEYS}


def main(_: list[str]) -> None:
    """Prints a line for each evaluator of the config."""
    config: ConfigDict = _CONFIG.value

    def source(spec: Mapping[str, Any]) -> Source:
        return build_source(spec, config.data.root, config.seed)

    for name, settings in config.evals.items():
        if settings.kind not in KINDS:
            print(f"{name}: nothing is trivial for {settings.kind!r} but chance.")
            continue
        field, scores = KINDS[settings.kind]
        train, held_out = source(_alone(config.data.train[0])), source(settings.source)
        # An evaluator's limit counts pictures for captions and items otherwise.
        items = Items(held_out, field, settings.limit if field != "captions" else 0)
        if field == "captions" and settings.limit:
            items.places = [place for place in items.places if place[0] < settings.limit]
        known = Items(train, field, DRAWN if isinstance(train, Scenes) else 0)
        for score in scores:
            said, figures = score(known, items)
            told = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
            print(f"{name}: {said} for all of {held_out!r}: {told}")


if __name__ == "__main__":
    app.run(main)
