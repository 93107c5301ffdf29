"""Answers against those of a plain loop, and metrics against hand-worked ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mplug_jax.config import vqa_eval
from mplug_jax.data.items import Items
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.tasks.evaluators.held_out import HeldOut
from mplug_jax.tasks.evaluators.vqa import VQAEvaluator, answer_metrics, plain
from mplug_jax.tasks.vqa import question_examples
from tests.tasks.evaluators.small import Call, make_setup, mesh_of, place
from tests.tasks.evaluators.small import random_params as random

ASKED = 12


@pytest.fixture(scope="module")
def setup(tokenizer):
    return make_setup(tokenizer, "vqa")


@pytest.fixture(scope="module")
def params(setup):
    return random(setup)


@pytest.fixture(scope="module")
def call(setup, params):
    return Call(setup, params)


@pytest.fixture(scope="module")
def source():
    return Scenes("full", "val", 16, fields=("captions", "questions"))


@pytest.fixture(scope="module")
def asked(setup, source):
    """The questions and their examples."""
    items, examples = Items(source, "questions", ASKED), question_examples(setup, setup.transform)
    return [(items[i]["questions"][0], examples(items[i])) for i in range(ASKED)]


def evaluator(setup, source, mesh, **changes):
    made = vqa_eval({}, **{"limit": ASKED} | changes)
    options = {name: value for name, value in made.items() if name not in ("kind", "source")}
    return VQAEvaluator(HeldOut(setup, source, mesh), **options)


def written(folder):
    lines = json.loads((folder / "answers.json").read_text())
    return [line["answer"] for line in lines], [line["question_id"] for line in lines]


def share(answers, questions):
    right = [a == next(iter(q["answers"])) for a, q in zip(answers, questions, strict=True)]
    return 100 * sum(right) / len(right)


@pytest.mark.slow
def test_generated_answers_are_the_greedy_ones(
    setup, params, call, source, asked, tokenizer, tmp_path
):
    mesh = mesh_of(2)
    metrics = evaluator(setup, source, mesh, max_length=4)(place(params, mesh), tmp_path)
    expected = [
        tokenizer.decode(call.greedy(call.memory_of(example), [tokenizer.cls_id], 4, tokenizer))
        for _, example in asked
    ]
    assert len(set(expected)) > 1
    assert written(tmp_path) == (expected, list(range(ASKED)))
    assert metrics["accuracy"] == share(expected, [question for question, _ in asked])
    with Image.open(tmp_path / "vqa.png") as sheet:
        assert sheet.format == "PNG"


@pytest.mark.slow
def test_ranked_answers_are_the_likeliest_of_the_source(
    setup, params, call, source, asked, tokenizer, tmp_path
):
    mesh = mesh_of(2)
    ranker = evaluator(setup, source, mesh, answers="rank", rank=1000)
    metrics = ranker(place(params, mesh), tmp_path)
    every = {a for i in range(16) for q in source[i]["questions"] for a in q["answers"]}
    candidates, expected = sorted(every), []
    encoded = [tokenizer.encode(answer, 12) for answer in candidates]
    for _, example in asked:
        memory = [np.repeat(x, len(candidates), axis=0) for x in call.memory_of(example)]
        logits = call("decode", np.stack([ids[:-1] for ids, _ in encoded]), *memory)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores = [
            sum(rows[t, ids[t + 1]] for t in range(int(mask.sum()) - 1))
            for rows, (ids, mask) in zip(log_probs, encoded, strict=True)
        ]
        expected.append(candidates[int(np.argmax(scores))])
    assert len(set(expected)) > 1
    answers, _ = written(tmp_path)
    assert answers == expected
    questions = [question for question, _ in asked]
    assert metrics["accuracy"] == share(expected, questions)
    for kind in {question["type"] for question in questions}:
        rows = [i for i in range(ASKED) if questions[i]["type"] == kind]
        chosen = [[part[i] for i in rows] for part in (expected, questions)]
        assert metrics[f"accuracy_{kind}"] == share(*chosen)


def test_candidates_can_come_from_a_file(setup, source, tmp_path):
    with setup.config.unlocked():
        setup.config.data.root = str(tmp_path)
    (tmp_path / "answers.json").write_text('["no", "yes", "no"]')
    (tmp_path / "other.json").write_text('[{"answer": "no"}]')
    evaluator(setup, source, mesh_of(1), answers="rank", answer_list="answers.json")
    with pytest.raises(SourceError, match=r"other.json: is no JSON list of answers"):
        evaluator(setup, source, mesh_of(1), answers="rank", answer_list="other.json")
    with pytest.raises(SourceError, match=r"there is no file .*none.json"):
        evaluator(setup, source, mesh_of(1), answers="rank", answer_list="none.json")


def test_sources_without_questions_or_answers_are_refused(setup):
    with pytest.raises(SourceError, match="holds no questions"):
        evaluator(setup, Scenes("full", "val", 2), mesh_of(1))
    unanswered = [{"questions": [{"question": "what", "answers": {}}]}]
    with pytest.raises(SourceError, match="holds no answers to rank"):
        evaluator(setup, unanswered, mesh_of(1), answers="rank")


def test_questions_without_a_truth_have_no_metric(tokenizer):
    assert answer_metrics({0: "yes"}, {0: {"question": "what", "answers": {}}}, tokenizer) == {}


def test_the_challenges_accuracy_goes_first(tokenizer):
    """Two of three people said yes: 2/3 of a hit; one of three said two."""
    questions = {
        0: {"annotators": ["yes", "yes", "no"], "answer_type": "yes/no", "answers": {"yes": 0.7}},
        1: {"annotators": ["2", "1", "1"], "answer_type": "number", "answers": {"1": 0.7}},
    }
    metrics = answer_metrics({0: "yes", 1: "two"}, questions, tokenizer)
    # Leaving one person out: (1 + 1 + 2) / 3 / 3, and (0 + 1 + 1) / 3 / 3.
    yes, two = 100 * 4 / 9, 100 * 2 / 9
    assert metrics == pytest.approx(
        {"accuracy": (yes + two) / 2, "accuracy_yes_no": yes, "accuracy_number": two}
    )


def test_soft_labels_are_looked_up(tokenizer):
    questions = {0: {"soft_labels": {"red": 0.6, "blue": 1.0}}, 1: {"soft_labels": {"one": 1.0}}}
    metrics = answer_metrics({0: "red", 1: "two"}, questions, tokenizer)
    assert metrics == pytest.approx({"soft_accuracy": 30.0})


def test_the_most_frequent_answer_counts_and_each_type_by_itself(tokenizer):
    questions = {
        0: {"answers": {"red": 0.3, "blue": 0.7}, "type": "colour"},
        1: {"answers": {"red": 1.0}, "type": "colour"},
        2: {"answers": {"yes": 1.0}, "type": "is there?"},
        3: {"answers": {}},
    }
    answers = {0: "red", 1: "red", 2: "yes", 3: "anything"}
    assert answer_metrics(answers, questions, tokenizer) == pytest.approx(
        {"accuracy": 200 / 3, "accuracy_colour": 50.0, "accuracy_is_there_": 100.0}
    )


def test_answers_are_compared_as_the_tokenizer_reads_them(tokenizer):
    assert plain("Red  Circle", tokenizer) == "red circle"
    assert plain("§€", tokenizer) == "§€"  # both unknown: they must not become equal
    answers = {0: "red circle", 1: "€"}
    questions = {0: {"answers": {"Red Circle": 1.0}}, 1: {"answers": {"§": 1.0}}}
    assert answer_metrics(answers, questions, tokenizer) == {"accuracy": 50.0}
