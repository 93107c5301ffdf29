"""Boxes against those of a plain loop over the coordinate tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.items import Items
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.task_examples import PhraseExamples
from mplug_jax.tasks.evaluators.grounding import (
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    GroundingEvaluator,
    draw_boxes,
)
from mplug_jax.tasks.evaluators.held_out import HeldOut
from tests.tasks.evaluators.small import BINS, LENGTH, Call, make_setup, mesh_of, place
from tests.tasks.evaluators.small import random_params as random

PHRASES = 12


@pytest.fixture(scope="module")
def setup(tokenizer):
    return make_setup(tokenizer, "grounding")


def overlap(a, b):
    """IoU of two boxes given by their corners."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(area) - width * height)


def by_corners(cx, cy, width, height):
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]


@pytest.mark.slow
def test_boxes_are_four_greedy_tokens_within_the_bins(setup, tokenizer, tmp_path):
    params, mesh = random(setup), mesh_of(2)
    source = Scenes("full", "val", 16, fields=("captions", "phrases"))
    evaluator = GroundingEvaluator(HeldOut(setup, source, mesh), limit=PHRASES)
    metrics = evaluator(place(params, mesh), tmp_path)

    call, items = Call(setup, params), Items(source, "phrases", PHRASES)
    examples = PhraseExamples(tokenizer, BoxTransform((32, 32)), LENGTH)
    first = tokenizer.vocab_size + 1  # after the tokenizer's tokens and the prefix
    bins = np.arange(first + BINS) >= first
    boxes = []
    for index in range(PHRASES):
        memory = call.memory_of(examples(items[index]))
        tokens = call.greedy(memory, [first - 1], 4, tokenizer, bins)
        box = by_corners(*((token - first) / (BINS - 1) for token in tokens))
        boxes.append([min(max(x, 0.0), 1.0) for x in box])
    true = [items[index]["phrases"][0]["box"] for index in range(PHRASES)]
    lines = json.loads((tmp_path / "boxes.json").read_text())
    assert [line["box"] for line in lines] == [pytest.approx(box, abs=1e-6) for box in boxes]
    assert [line["true"] for line in lines] == [pytest.approx(box, abs=1e-6) for box in true]
    assert [line["phrase"] for line in lines] == [
        items[index]["phrases"][0]["phrase"] for index in range(PHRASES)
    ]
    assert len({tuple(box) for box in boxes}) > 2
    shared = [overlap(*pair) for pair in zip(boxes, true, strict=True)]
    assert metrics == pytest.approx(
        {"acc@0.5": 100 * np.mean(np.array(shared) >= 0.5), "mean_iou": 100 * np.mean(shared)}
    )
    with Image.open(tmp_path / "grounding.png") as sheet:
        assert sheet.format == "PNG"


def test_both_boxes_are_drawn():
    picture = np.zeros((32, 32, 3), np.uint8)
    true, predicted = np.array([0.1, 0.1, 0.5, 0.5]), np.array([0.9, 0.6, 0.6, 0.9])
    drawn = draw_boxes(picture, true, predicted)
    assert drawn.shape == (192, 192, 3)
    for colour, corner, inside in (
        (TRUE_COLOUR, (19, 19), (57, 57)),
        (PREDICTED_COLOUR, (114, 114), (143, 143)),  # its sides come the wrong way round
    ):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert drawn[corner].tolist() == wanted
        assert drawn[inside].tolist() == [0, 0, 0]


def test_what_cannot_be_located_is_refused(setup, tokenizer):
    with pytest.raises(SourceError, match="holds no phrases"):
        GroundingEvaluator(HeldOut(setup, Scenes("full", "val", 2), mesh_of(1)), limit=0)
    source = Scenes("full", "val", 2, fields=("phrases",))
    small = make_setup(tokenizer)  # a vocabulary without the coordinates
    with pytest.raises(ValueError, match=f"bins={BINS} end at token .* but the vocabulary has"):
        GroundingEvaluator(HeldOut(small, source, mesh_of(1)), limit=0)
