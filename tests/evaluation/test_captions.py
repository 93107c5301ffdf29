"""The caption suite: figures of pycocoevalcap, hand-made cases, and what happens without Java."""

import logging
import math
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge

from mplug_jax.evaluation import captions
from mplug_jax.evaluation.captions import caption_metrics
from mplug_jax.evaluation.cider import Cider
from mplug_jax.evaluation.ptb import ptb_tokenize

NAMES = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


def test_equals_pycocoevalcap_in_percent(caption_corpus):
    hypotheses, references = caption_corpus
    metrics = caption_metrics(hypotheses, references, java=False)
    truth = {str(key): [ptb_tokenize(text) for text in each] for key, each in references.items()}
    guess = {str(key): [ptb_tokenize(hypotheses[key])] for key in references}
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    expected = {f"bleu_{n + 1}": 100 * value for n, value in enumerate(bleu)}
    expected["rouge_l"] = 100 * Rouge().compute_score(truth, guess)[0]
    # The scorer of the rewards is another implementation.
    ids = list(truth)
    expected["cider"] = 100 * Cider(truth).score([guess[key][0] for key in ids], ids).mean()
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert set(metrics) == NAMES
    assert 5 < metrics["bleu_4"] < 95 and 50 < metrics["cider"] < 950


def test_one_caption_by_hand():
    """'the dog' against 'the dog runs': both words right, one too short by a third."""
    metrics = caption_metrics({1: "The dog!"}, {1: ["the dog runs."]}, java=False)
    brevity = math.exp(1 - 3 / 2)
    assert metrics["bleu_1"] == pytest.approx(100 * brevity)
    assert metrics["bleu_2"] == pytest.approx(100 * brevity)
    # No trigram at all counts as 1e-15 of 1e-9, to the third root.
    assert metrics["bleu_3"] == pytest.approx(100 * brevity * 1e-2)
    # F with beta 1.2 of precision 1 and recall 2/3.
    assert metrics["rouge_l"] == pytest.approx(100 * 2.44 * (2 / 3) / (2 / 3 + 1.44))
    assert metrics["cider"] == 0  # every n-gram is in every document


def test_order_and_split_over_processes_do_not_count(caption_corpus):
    hypotheses, references = caption_corpus
    keys = list(hypotheses)
    random.Random(1).shuffle(keys)
    merged = {key: hypotheses[key] for key in keys[::2]} | {
        key: hypotheses[key] for key in keys[1::2]
    }
    shuffled = {key: references[key] for key in reversed(keys)}
    assert caption_metrics(merged, shuffled, java=False) == caption_metrics(
        hypotheses, references, java=False
    )


def test_perfect_captions():
    truth = {i: f"a {thing} is on the {place}" for i, thing, place in SCENES}
    metrics = caption_metrics(truth, {key: [text] for key, text in truth.items()}, java=False)
    assert metrics == pytest.approx(dict.fromkeys(NAMES - {"cider"}, 100.0) | {"cider": 1000.0})


SCENES = [(0, "dog", "grass"), (1, "cat", "sofa"), (2, "man", "bench"), (3, "cup", "table")]


def test_without_java_one_line_says_what_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(captions.shutil, "which", lambda program: None)
    with caplog.at_level(logging.WARNING):
        metrics = caption_metrics({1: "a dog"}, {1: ["a dog"]})
    assert set(metrics) == NAMES
    assert len(caplog.records) == 1
    assert "METEOR and SPICE are left out: they need Java" in caplog.text


class Fixed:
    def compute_score(self, truth, guess):
        assert truth == {0: ["a dog"]} and guess == {0: ["a dog"]}
        return 0.25, [0.25]


def broken():
    raise OSError("java ran out of memory")


def test_java_metrics_and_their_failures(monkeypatch, caplog, tmp_path):
    models = tmp_path / "models.jar"
    monkeypatch.setattr(captions.shutil, "which", lambda program: "/usr/bin/java")
    monkeypatch.setattr(captions, "_SPICE_MODELS", models)
    monkeypatch.setattr(captions, "Meteor", Fixed)
    monkeypatch.setattr(captions, "Spice", broken)
    metrics = caption_metrics({1: "A dog."}, {1: ["a dog"]})
    assert metrics["meteor"] == 25.0 and "spice" not in metrics
    assert "SPICE is left out: fetch its models" in caplog.text

    models.touch()
    caplog.clear()
    metrics = caption_metrics({1: "A dog."}, {1: ["a dog"]})
    assert set(metrics) == NAMES | {"meteor"}
    assert "SPICE is left out: its Java program failed: java ran out of memory" in caplog.text


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({"a": "x", "b": "y"}, {"a": ["x"]}, r"1 caption \('b'\) of unknown id"),
        ({"a": "x"}, {"a": ["x"], "c": ["z"]}, r"1 caption \('c'\) missing"),
        ({"a": "x", "d": "y"}, {"a": ["x"], "d": []}, "no reference, the first is 'd'"),
        ({"a": "x"}, {"a": [" ... "]}, "no reference has a word; picture 'a'"),
        ({}, {}, "no caption to score"),
    ],
)
def test_captions_that_do_not_fit_the_references_raise(hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(hypotheses, references, java=False)
