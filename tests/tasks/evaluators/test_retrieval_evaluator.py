"""Retrieval against brute force: one picture and one text at a time, and every pair fused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.examples import EvalExamples
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.tasks.evaluators import retrieval
from mplug_jax.tasks.evaluators.held_out import HeldOut
from mplug_jax.tasks.evaluators.retrieval import RetrievalEvaluator
from tests.tasks.evaluators.small import LENGTH, Broken, Call, make_setup, mesh_of, place
from tests.tasks.evaluators.small import random_params as random

pytestmark = pytest.mark.slow

SCENES, CAPTIONS, RERANK, BAD = 25, 2, 5, 3


@pytest.fixture(scope="module")
def setup(tokenizer):
    return make_setup(tokenizer)


@pytest.fixture(scope="module")
def params(setup):
    return random(setup)


@pytest.fixture(scope="module")
def source():
    return Broken(Scenes("full", "val", 64), {BAD})


@pytest.fixture(scope="module")
def small_blocks():
    """Several blocks of pictures, each of several blocks of pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK", 8)
        patch.setattr(retrieval, "PAIRS", 16)
        yield


@pytest.fixture(scope="module")
def retrieved(setup, params, source, small_blocks, tmp_path_factory):
    """Metrics by the number of devices, and the folder of samples of the first."""
    folder = tmp_path_factory.mktemp("samples")
    metrics = {}
    for count, samples in ((1, folder), (8, None)):
        mesh = mesh_of(count)
        settings = {"limit": SCENES, "rerank": RERANK, "captions": CAPTIONS, "score": "itm"}
        evaluator = RetrievalEvaluator(HeldOut(setup, source, mesh), **settings)
        metrics[count] = evaluator(place(params, mesh), samples)
    return metrics, folder


def recalls(scores: np.ndarray, right: np.ndarray, name: str) -> dict[str, float]:
    """Share of queries with a right item in front, wrong ones of equal score counted before it."""
    ranks = []
    for row, good in zip(scores, right, strict=True):
        best = max(score for score, ok in zip(row, good, strict=True) if ok)
        ranks.append(sum(score >= best for score, ok in zip(row, good, strict=True) if not ok))
    found = {f"{name}_r{k}": 100 * sum(r < k for r in ranks) / len(ranks) for k in (1, 5, 10)}
    mean = sum(found.values()) / 3
    return found | {f"{name}_r_mean": mean, f"{name}_medr": float(np.median(ranks)) + 1}


def both_ways(to_text: np.ndarray, to_image: np.ndarray, right: np.ndarray) -> dict[str, float]:
    metrics = recalls(to_text, right, "txt") | recalls(to_image, right.T, "img")
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


def reranked(similarity: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The scores of each row's best by similarity; the others behind them, by similarity."""
    scores = similarity.astype(np.float64) - 1e6
    for row in range(len(scores)):
        best = sorted(range(scores.shape[1]), key=lambda c: -similarity[row, c])[:RERANK]
        scores[row, best] = logits[row, best]
    return scores


def pair_scores(call: Call, examples: EvalExamples, records: list[Any]) -> Any:
    """Similarities, match logits and log odds of a match of every picture with every text."""
    captions = [caption for record in records for caption in record["captions"][:CAPTIONS]]
    assert len(set(captions)) == len(captions)  # equal texts would tie
    images = [call("encode_image", examples(record)["image"][None]) for record in records]
    masks = [examples.tokenizer.encode(caption, LENGTH)[1] for caption in captions]
    texts = [
        call("encode_text", examples.tokenizer.encode(caption, LENGTH)[0][None], mask[None])
        for caption, mask in zip(captions, masks, strict=True)
    ]
    image_feats = np.concatenate([call("project_image", x) for x in images])
    text_feats = np.concatenate([call("project_text", x) for x in texts])
    all_texts, all_masks = np.concatenate(texts), np.stack(masks)
    logits = [
        call("match", call("fuse", np.repeat(x, len(texts), 0), all_texts, all_masks)[1])
        for x in images
    ]
    logits = np.stack(logits)
    return image_feats @ text_feats.T, logits[..., 1], logits[..., 1] - logits[..., 0]


def right_pairs(records: list[Any]) -> np.ndarray:
    return np.repeat(np.eye(len(records), dtype=bool), CAPTIONS, axis=1)


@pytest.fixture(scope="module")
def brute(setup, params, source, tokenizer):
    records = [source[i] for i in range(SCENES) if i != BAD]
    examples = EvalExamples(tokenizer, setup.transform, LENGTH)
    similarity, logits, _ = pair_scores(Call(setup, params), examples, records)
    right = right_pairs(records)
    by_itc = both_ways(similarity, similarity.T, right)
    by_itm = both_ways(reranked(similarity, logits), reranked(similarity.T, logits.T), right)
    itc = {f"itc_{name}": value for name, value in by_itc.items() if "medr" not in name}
    return by_itm | itc


def test_retrieval_is_that_of_brute_force(retrieved, brute):
    metrics, _ = retrieved
    assert metrics[1] == pytest.approx(brute)
    assert len(set(brute.values())) > 6  # a collapsed model would agree whatever it computes
    assert {n: v for n, v in brute.items() if f"itc_{n}" in brute and v != brute[f"itc_{n}"]}


def test_retrieval_does_not_depend_on_the_mesh(retrieved):
    metrics, _ = retrieved
    assert metrics[8] == pytest.approx(metrics[1])


def test_the_best_of_every_query_are_written(retrieved, source):
    metrics, folder = retrieved
    rows = json.loads((folder / "retrieval.json").read_text())
    records = [source[i] for i in range(SCENES) if i != BAD]
    captions = {record["id"]: record["captions"][:CAPTIONS] for record in records}
    owner = {caption: name for name, given in captions.items() for caption in given}
    pictures, texts = rows[: len(records)], rows[len(records) :]
    assert [row["picture"] for row in pictures] == list(captions)
    assert [row["text"] for row in texts] == list(owner)
    assert all(len(set(row["texts"])) == retrieval.SHOWN for row in pictures)
    for k in (1, 10):
        found = [any(t in captions[r["picture"]] for t in r["texts"][:k]) for r in pictures]
        assert 100 * np.mean(found) == pytest.approx(metrics[1][f"txt_r{k}"])
        found = [owner[r["text"]] in r["pictures"][:k] for r in texts]
        assert 100 * np.mean(found) == pytest.approx(metrics[1][f"img_r{k}"])


def test_retrieval_writes_a_sheet(retrieved):
    _, folder = retrieved
    with Image.open(folder / "retrieval.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 4 * 32


@pytest.mark.parametrize("score", ["itm+sim", "itm+itc"])
def test_clips_are_ranked_by_match_and_similarity_together(tokenizer, params, small_blocks, score):
    setup = make_setup(tokenizer, frames=2)
    source = Scenes("full", "val", 12, video=True)
    settings = {"limit": 0, "rerank": RERANK, "captions": CAPTIONS, "score": score}
    evaluator = RetrievalEvaluator(HeldOut(setup, source, mesh_of(1)), **settings)
    metrics = evaluator(place(params, mesh_of(1)))

    records = [source[i] for i in range(12)]
    examples = EvalExamples(tokenizer, setup.transform, LENGTH, frames=2)
    call = Call(setup, params)
    assert call("temperature") > 0.05  # else the similarity alone would decide
    similarity, logits, odds = pair_scores(call, examples, records)
    both = logits + similarity if score == "itm+sim" else odds + similarity / call("temperature")
    scores = reranked(similarity, both), reranked(similarity.T, both.T)
    expected = both_ways(*scores, right_pairs(records))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert len(set(expected.values())) > 4


def test_an_unknown_score_is_refused(setup, source):
    settings = {"limit": 4, "rerank": 2, "captions": 1}
    with pytest.raises(ValueError, match="'sim' is unknown; choose itm, itm\\+sim, itm\\+itc"):
        RetrievalEvaluator(HeldOut(setup, source, mesh_of(1)), **settings, score="sim")
