"""Decisions against those of one example at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.tasks.classification import class_examples
from mplug_jax.tasks.evaluators.classification import ClassificationEvaluator
from mplug_jax.tasks.evaluators.held_out import HeldOut
from tests.tasks.evaluators.small import Call, make_setup, mesh_of, place
from tests.tasks.evaluators.small import random_params as random

RECORDS = 12
LABELS = {"nlvr2": ("false", "true"), "snli_ve": ("entailment", "neutral", "contradiction")}
FIELD = {"nlvr2": "pair", "snli_ve": "entailment"}


def logits_of(call, example):
    """Of each class: the text fused with each picture, the first tokens together."""
    ids, mask = example["text_ids"][None], example["text_mask"][None]
    text = call("encode_text", ids, mask)
    pictures = example["image"] if example["image"].ndim == 4 else example["image"][None]
    fused = [
        call("fuse", call("encode_image", picture[None]), text, mask)[1] for picture in pictures
    ]
    return call("classify", np.concatenate(fused))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "classes", "classified"), [("nlvr2", 2, 2), ("snli_ve", 3, 1)])
def test_decisions_are_those_of_one_record_at_a_time(
    tokenizer, tmp_path, task, classes, classified
):
    setup = make_setup(tokenizer, task, classes=classes, classified=classified)
    params, mesh = random(setup), mesh_of(2)
    source = Scenes("full", "val", 16, fields=("captions", FIELD[task]))
    call, examples = Call(setup, params), class_examples(setup, setup.transform)
    logits = np.stack([logits_of(call, examples(source[i])) for i in range(RECORDS)])
    # A bias that makes the classes about as frequent as each other.
    bias = params["classifier"]["out"]["bias"]
    params["classifier"]["out"]["bias"] = bias - logits.mean(axis=0)
    said = [LABELS[task][row.argmax()] for row in logits - logits.mean(axis=0)]
    assert len(set(said)) == classes

    evaluator = ClassificationEvaluator(HeldOut(setup, source, mesh), limit=RECORDS)
    metrics = evaluator(place(params, mesh), tmp_path)

    true = [str(source[i][FIELD[task]]["label"]).lower() for i in range(RECORDS)]
    hits = np.array([a == b for a, b in zip(said, true, strict=True)])
    expected = {"accuracy": 100 * hits.mean()}
    for label in set(true):
        expected[f"accuracy_{label}"] = 100 * hits[np.array(true) == label].mean()
    assert metrics == pytest.approx(expected)
    lines = json.loads((tmp_path / "predictions.json").read_text())
    assert lines == [
        {"id": source[i]["id"], "prediction": said[i], "label": true[i]} for i in range(RECORDS)
    ]
    if task == "nlvr2":
        rows = (tmp_path / "predictions.csv").read_text().splitlines()
        assert rows == [f"{line['id']},{line['prediction']}" for line in lines]
    with Image.open(tmp_path / "classification.png") as sheet:
        assert sheet.format == "PNG"


def test_a_source_without_the_tasks_records_is_refused(tokenizer):
    setup = make_setup(tokenizer, "nlvr2", classes=2, classified=2)
    data = HeldOut(setup, Scenes("full", "val", 2), mesh_of(1))
    with pytest.raises(SourceError, match="holds no pair, which task 'nlvr2' decides about"):
        ClassificationEvaluator(data, limit=0)
