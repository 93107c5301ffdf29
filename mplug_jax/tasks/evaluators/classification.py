"""NLVR2 and visual entailment: the share of right decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from mplug_jax.data.records import SourceError
from mplug_jax.data.task_examples import EntailmentExamples
from mplug_jax.evaluation.classification import classification_accuracy
from mplug_jax.tasks.classification import class_examples, class_logits
from mplug_jax.tasks.evaluators.held_out import HeldOut, Sheet, write_json

# NLVR2's labels, by class.
TRUTH_VALUES = ("false", "true")
# What a record must hold, by task, and the text in it.
FIELDS = {"nlvr2": ("pair", "sentence"), "snli_ve": ("entailment", "hypothesis")}


class ClassificationEvaluator:
    """Accuracy of what ``config.task`` decides.

    Args:
      limit: records; 0 takes all.

    Raises:
      SourceError: the source has nothing to decide.
    """

    def __init__(self, data: HeldOut, *, limit: int):
        self._data, self._limit = data, limit
        self._field, self._text = FIELDS[data.setup.config.task]
        if self._field not in data.source[0]:
            raise SourceError(
                f"{data.source!r} holds no {self._field}, which task "
                f"{data.setup.config.task!r} decides about: choose a source that does"
            )
        self._examples = class_examples(data.setup, data.transform)
        entailment = isinstance(self._examples, EntailmentExamples)
        self._labels = tuple(self._examples.labels) if entailment else TRUTH_VALUES

        def decide(params: Any, batch: Any) -> jax.Array:
            return class_logits(data.forward(params), batch).argmax(axis=-1)

        self._decide = data.compiled(decide)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """``accuracy`` in percent, and that of the records of each label, as ``accuracy_true``."""
        data, sheet = self._data, Sheet()
        predictions: dict[int, str] = {}
        truths: dict[int, str] = {}
        inputs = ("image", "text_ids", "text_mask")
        rows = data.each(self._decide, params, self._examples, inputs, limit=self._limit)
        for index, example, decided in rows:
            said = predictions[index] = self._labels[int(decided)]
            true = truths[index] = self._labels[int(example["label"])]
            if samples is not None and sheet.wants(example):
                text = data.source[index][self._field][self._text]
                sheet.add(example, f"{said}\n{text}", said == true)
        if samples is not None:
            lines = [
                {"id": data.source[index]["id"], "prediction": said, "label": truths[index]}
                for index, said in predictions.items()
            ]
            write_json(samples / "predictions.json", lines)
            if data.setup.config.task == "nlvr2":
                # As nlvr2/eval/metrics.py of lil-lab/nlvr reads them.
                rows = "".join(f"{line['id']},{line['prediction']}\n" for line in lines)
                (samples / "predictions.csv").write_text(rows)
            sheet.write(samples / "classification.png")
        metrics = classification_accuracy(predictions, truths)
        for label in self._labels:
            group = {index: true for index, true in truths.items() if true == label}
            if group:
                said = {index: predictions[index] for index in group}
                metrics[f"accuracy_{label}"] = classification_accuracy(said, group)["accuracy"]
        return metrics
