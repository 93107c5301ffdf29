"""The vectorised scorer against pycocoevalcap, the paper's formula and hand-made cases."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider as ReferenceCider

from mplug_jax.evaluation import cider
from mplug_jax.evaluation.cider import Cider, DocumentFrequency
from mplug_jax.evaluation.ptb import ptb_tokenize

REFERENCES = {
    "a": ["a dog runs on grass", "the dog runs"],
    "b": ["a cat sleeps"],
    7: ["two men talk on a bench", "men on a bench", "two men"],
}


def reference_scores(references, hypotheses):
    """pycocoevalcap's score of one hypothesis a picture, in the order of the references."""
    truth = {key: list(captions) for key, captions in references.items()}
    return ReferenceCider().compute_score(truth, {key: [hypotheses[key]] for key in truth})[1]


def paper_cider(hypothesis, references, frequencies, documents):
    """CIDEr of one caption as equations 1 to 4 of the paper have it (no stemming), times 10."""

    def vector(text, n):
        words = text.split()
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        return {
            gram: count * math.log(documents / max(1, frequencies.get(gram, 0)))
            for gram, count in counts.items()
        }

    def length(weights):
        return math.sqrt(sum(weight**2 for weight in weights.values()))

    total = 0.0
    for n in range(1, 5):
        ours = vector(hypothesis, n)
        for reference in references:
            theirs = vector(reference, n)
            dot = sum(weight * theirs.get(gram, 0.0) for gram, weight in ours.items())
            total += dot / (length(ours) * length(theirs)) if dot else 0.0
    return 10 * total / 4 / len(references)


def test_equals_pycocoevalcap_on_a_corpus(caption_corpus):
    hypotheses, references = caption_corpus
    references = {key: [ptb_tokenize(text) for text in each] for key, each in references.items()}
    hypotheses = {key: ptb_tokenize(text) for key, text in hypotheses.items()}
    expected = reference_scores(references, hypotheses)
    scores = Cider(references).score(list(hypotheses.values()), list(hypotheses))
    order = [list(references).index(key) for key in hypotheses]
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected[order], rtol=0, atol=1e-12)
    assert expected.max() == pytest.approx(10) or expected.max() > 5
    assert np.count_nonzero(expected) > 60


WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", ","]), max_size=9).map(" ".join)
PICTURE = st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3))


@settings(max_examples=80, deadline=None)
@given(st.lists(PICTURE, min_size=1, max_size=6))
def test_equals_pycocoevalcap_on_repeating_words(pictures):
    references = {number: texts for number, (_, texts) in enumerate(pictures)}
    references[len(pictures)] = ["a bird"]  # so that there is a word
    hypotheses = {number: text for number, (text, _) in enumerate(pictures)}
    hypotheses[len(pictures)] = "a bird that zzz"
    scores = Cider(references).score(list(hypotheses.values()), list(hypotheses))
    np.testing.assert_allclose(scores, reference_scores(references, hypotheses), atol=1e-12)


def test_plain_cider_equals_the_paper(caption_corpus):
    hypotheses, references = caption_corpus
    frequency = DocumentFrequency.count(references.values())
    scores = Cider(references, variant="cider").score(list(hypotheses.values()), list(hypotheses))
    expected = [
        paper_cider(text, references[key], frequency.counts, len(references))
        for key, text in hypotheses.items()
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert not np.allclose(scores, Cider(references).score(list(hypotheses.values()), hypotheses))


def test_a_caption_equal_to_its_only_reference_scores_ten():
    scores = Cider(REFERENCES).score(["a cat sleeps", "a dog sleeps", ""], ["b", "b", "b"])
    # Three words have no 4-gram, so that one of the four orders counts nothing.
    assert scores[0] == pytest.approx(7.5)
    assert 0 < scores[1] < scores[0] and scores[2] == 0


def test_repeating_a_word_pays_in_cider_alone():
    references = {0: ["a dog runs on grass"], 1: ["a cat sleeps"], 2: ["a man sits on a bench"]}
    texts, ids = ["a dog runs", "a dog runs dog dog dog dog dog"], [0, 0]
    once, many = Cider(references).score(texts, ids)
    assert many < 0.5 * once
    once_plain, many_plain = Cider(references, variant="cider").score(texts, ids)
    assert many_plain > 0.5 * once_plain


def test_scores_do_not_depend_on_batch_or_order(monkeypatch):
    scorer = Cider(REFERENCES)
    texts = ["a dog on a bench", "two men", "zzz men on a bench", "a cat", "runs runs", ""] * 3
    ids = ["a", 7, 7, "b", "a", "b"] * 3
    together = scorer.score(texts, ids)
    alone = [scorer.score([text], [key])[0] for text, key in zip(texts, ids, strict=True)]
    np.testing.assert_array_equal(together, alone)
    backwards = Cider(dict(reversed(REFERENCES.items()))).score(texts[::-1], ids[::-1])
    np.testing.assert_allclose(together, backwards[::-1], atol=1e-14)
    monkeypatch.setattr(cider, "CHUNK", 4)
    np.testing.assert_array_equal(together, scorer.score(texts, ids))
    assert scorer.score([], []).shape == (0,)


def test_frequencies_counted_elsewhere():
    """A scorer of one picture with the corpus' frequencies gives what the whole corpus gives."""
    frequency = DocumentFrequency.count(REFERENCES.values())
    assert frequency.documents == 3
    assert frequency.counts["a",] == 3 and frequency.counts["on", "a"] == 1
    text = "a dog and two men talk on a bench"
    expected = Cider(REFERENCES).score([text], ["a"])
    scorer = Cider({"a": REFERENCES["a"]}, frequency=frequency)
    np.testing.assert_allclose(scorer.score([text], ["a"]), expected, atol=1e-14)
    # Alone, everything is in every document and weighs nothing.
    assert Cider({"a": REFERENCES["a"]}).score([text], ["a"]) == 0


@pytest.mark.parametrize(
    ("references", "keywords", "message"),
    [
        ({}, {}, "at least one picture"),
        ({"a": ["x"], "b": []}, {}, "'b'"),
        ({"a": ["", " "]}, {}, "no reference has a word"),
        ({"a": ["x"]}, {"variant": "cider-d"}, "'cider-d'"),
    ],
)
def test_unusable_references_raise(references, keywords, message):
    with pytest.raises(ValueError, match=message):
        Cider(references, **keywords)


@pytest.mark.parametrize(
    ("counts", "documents", "message"),
    [({("a",): 1}, 0, "documents is 0"), ({("a",) * 5: 1}, 3, "1 to 4"), ({(): 1}, 3, "1 to 4")],
)
def test_unusable_frequencies_raise(counts, documents, message):
    with pytest.raises(ValueError, match=message):
        DocumentFrequency(counts, documents)


def test_hypotheses_without_references_raise():
    with pytest.raises(ValueError, match=r"1 ids have no references, the first is 'zebra'"):
        Cider(REFERENCES).score(["x", "y"], ["a", "zebra"])
    with pytest.raises(ValueError, match="2 hypotheses, but 1 ids"):
        Cider(REFERENCES).score(["x", "y"], ["a"])
