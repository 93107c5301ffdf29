"""Evaluators: run a model over held-out data and return the metrics of the field.

Each is built from a ``HeldOut`` and its settings in ``config.evals``; it is a callable
``(params, folder for samples or None) -> {metric: value}``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mplug_jax.data.sources import build_source
from mplug_jax.tasks.evaluators.caption import CaptionEvaluator
from mplug_jax.tasks.evaluators.classification import ClassificationEvaluator
from mplug_jax.tasks.evaluators.grounding import GroundingEvaluator
from mplug_jax.tasks.evaluators.held_out import HeldOut
from mplug_jax.tasks.evaluators.retrieval import RetrievalEvaluator
from mplug_jax.tasks.evaluators.vqa import VQAEvaluator
from mplug_jax.tasks.setup import Setup

EVALUATORS = {
    "retrieval": RetrievalEvaluator,
    "caption": CaptionEvaluator,
    "vqa": VQAEvaluator,
    "grounding": GroundingEvaluator,
    "classification": ClassificationEvaluator,
}


def build_evaluators(setup: Setup, mesh: Any) -> dict[str, Any]:
    """The evaluators of ``config.evals`` by name: callables (params, folder or None) -> metrics.

    Where several are of one kind, whose files have the same names, each writes into a folder of
    its own name.

    Raises:
      ValueError, SourceError: settings or sources that cannot work.
    """
    config, built = setup.config, {}
    for name, settings in config.evals.items():
        source = build_source(
            settings.source, config.data.root, config.seed, config.data.max_bad_fraction
        )
        options = {k: v for k, v in settings.items() if k not in ("kind", "source")}
        built[name] = EVALUATORS[settings.kind](HeldOut(setup, source, mesh), **options)
    kinds = [settings.kind for settings in config.evals.values()]
    return {
        name: built[name]
        if kinds.count(kind) == 1
        else functools.partial(_apart, built[name], name)
        for name, kind in zip(built, kinds, strict=True)
    }


def _apart(evaluator: Any, name: str, params: Any, samples: Path | None = None) -> dict[str, float]:
    return evaluator(params, None if samples is None else samples / name)
