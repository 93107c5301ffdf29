"""Evaluators against brute force: one picture and one text at a time, and every pair fused."""

from __future__ import annotations

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.examples import EvalExamples
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.tokenizers import build_tokenizer
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.models.config import preset
from mplug_jax.models.mplug import MPlug, init_params
from mplug_jax.tasks import evaluators
from mplug_jax.tasks.evaluators import CaptionEvaluator, HeldOut, RetrievalEvaluator
from mplug_jax.training.sharding import make_mesh, replicated

pytestmark = pytest.mark.slow

SCENES, CAPTIONS, RERANK, LENGTH, WORDS = 24, 2, 5, 40, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    spec = {"kind": "sentencepiece", "vocab_size": 128}
    return build_tokenizer(spec, str(tmp_path_factory.mktemp("t")), Scenes("full", "train", 64))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = preset("tiny").replace(
        vision={"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64},
        text={
            "width": 32,
            "depth": 1,
            "heads": 2,
            "mlp_dim": 64,
            "vocab_size": tokenizer.vocab_size,
        },
        fusion={"depth": 2, "stride": 1},
        decoder={"depth": 1},
        embed_dim=8,
    )
    return MPlug(config)


@pytest.fixture(scope="module")
def params(model):
    """Random and large, so that pictures and texts are told apart."""
    shapes = nn.meta.unbox(
        jax.eval_shape(lambda key: init_params(model.config, key), jax.random.key(0))
    )
    rng = np.random.default_rng(2)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        return {"scale": 1 + 0.2 * noise, "kernel": 0.3 * noise}.get(name, 0.5 * noise)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def parts(tokenizer):
    source = Scenes("full", "val", 64)
    transform = ImageTransform((32, 32), train=False)
    return tokenizer, source, EvalExamples(tokenizer, transform, LENGTH)


@functools.cache
def mesh_of(count: int) -> Any:
    return make_mesh({"data": count}, jax.devices()[:count])


@pytest.fixture(scope="module")
def call(model, params):
    """A model method, compiled, by name."""
    methods: dict[str, Any] = {}

    def call(name: str, *args: Any) -> Any:
        if name not in methods:
            methods[name] = jax.jit(
                lambda params, *args: model.apply({"params": params}, *args, method=name)
            )
        return methods[name](params, *args)

    return call


def place(params: Any, mesh: Any) -> Any:
    return jax.device_put(params, replicated(mesh))


@pytest.fixture(scope="module")
def retrieved(model, params, parts, tmp_path_factory):
    """Metrics by the number of devices, and the folder of samples of the first."""
    folder = tmp_path_factory.mktemp("samples")
    metrics = {}
    for count, samples in ((1, folder), (8, None)):
        mesh = mesh_of(count)
        data = HeldOut(model, *parts, mesh)
        evaluator = RetrievalEvaluator(data, limit=SCENES, rerank=RERANK, captions=CAPTIONS)
        metrics[count] = evaluator(place(params, mesh), samples)
    return metrics, folder


def recalls(scores: np.ndarray, right: np.ndarray, name: str) -> dict[str, float]:
    """Share of queries with a right item in front, wrong ones of equal score counted before it."""
    ranks = []
    for row, good in zip(scores, right, strict=True):
        best = max(score for score, ok in zip(row, good, strict=True) if ok)
        ranks.append(sum(score >= best for score, ok in zip(row, good, strict=True) if not ok))
    found = {f"{name}_r{k}": 100 * sum(r < k for r in ranks) / len(ranks) for k in (1, 5, 10)}
    return found | {f"{name}_r_mean": sum(found.values()) / 3}


def both_ways(to_text: np.ndarray, to_image: np.ndarray, right: np.ndarray) -> dict[str, float]:
    metrics = recalls(to_text, right, "txt") | recalls(to_image, right.T, "img")
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


def reranked(similarity: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The match logits of each row's best by similarity; the others behind them all."""
    scores = np.full(similarity.shape, -np.inf)
    for row in range(len(scores)):
        best = sorted(range(scores.shape[1]), key=lambda c: -similarity[row, c])[:RERANK]
        scores[row, best] = logits[row, best]
    return scores


@pytest.fixture(scope="module")
def brute(call, parts):
    tokenizer, source, examples = parts
    records = [source[i] for i in range(SCENES)]
    captions = [caption for record in records for caption in record["captions"][:CAPTIONS]]
    assert len(set(captions)) == len(captions) == SCENES * CAPTIONS  # equal texts would tie
    images = [call("encode_image", examples(record)["image"][None]) for record in records]
    texts, masks = [], []
    for caption in captions:
        ids, mask = tokenizer.encode(caption, LENGTH)
        texts.append(call("encode_text", ids[None], mask[None]))
        masks.append(mask)
    image_feats = np.concatenate([call("project_image", x) for x in images])
    text_feats = np.concatenate([call("project_text", x) for x in texts])
    all_texts, all_masks = np.concatenate(texts), np.stack(masks)
    logits = np.stack(
        [
            call("match", call("fuse", np.repeat(x, len(texts), 0), all_texts, all_masks)[1])[:, 1]
            for x in images
        ]
    )
    similarity = image_feats @ text_feats.T
    right = np.arange(SCENES)[:, None] == np.arange(len(texts)) // CAPTIONS
    by_itc = both_ways(similarity, similarity.T, right)
    by_itm = both_ways(reranked(similarity, logits), reranked(similarity.T, logits.T), right)
    return by_itm | {f"itc_{name}": value for name, value in by_itc.items()}


def test_retrieval_is_that_of_brute_force(retrieved, brute):
    metrics, _ = retrieved
    assert metrics[1] == pytest.approx(brute)
    assert len(set(brute.values())) > 6  # a collapsed model would agree whatever it computes
    assert {n: v for n, v in brute.items() if f"itc_{n}" in brute and v != brute[f"itc_{n}"]}


def test_retrieval_does_not_depend_on_the_mesh(retrieved):
    metrics, _ = retrieved
    assert metrics[8] == pytest.approx(metrics[1])


def test_retrieval_writes_a_sheet(retrieved):
    _, folder = retrieved
    with Image.open(folder / "retrieval.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 4 * 32


def test_captions_are_the_greedy_ones_of_each_picture(
    model, params, parts, call, tmp_path, monkeypatch
):
    tokenizer, source, examples = parts
    shown: list[str] = []
    draw = evaluators.sample_sheet

    def record(path: Any, images: Any, titles: Any, **options: Any) -> Any:
        shown.extend(titles)
        return draw(path, images, titles, **options)

    monkeypatch.setattr(evaluators, "sample_sheet", record)
    results, written = [], []
    for count in (1, 8):
        mesh = mesh_of(count)
        evaluator = CaptionEvaluator(HeldOut(model, *parts, mesh), limit=10, max_length=WORDS)
        results.append(evaluator(place(params, mesh), tmp_path / str(count)))
        with Image.open(tmp_path / str(count) / "captions.png") as sheet:
            assert sheet.format == "PNG"
        lines = json.loads((tmp_path / str(count) / "captions.json").read_text())
        written.append({line["image_id"]: line["caption"] for line in lines})

    prefix = jnp.array([[tokenizer.cls_id, tokenizer.sep_id]])
    mask = jnp.ones((1, 2), bool)
    expected = []
    for index in range(10):
        image = call("encode_image", examples(source[index])["image"][None])
        memory = call("memory", *call("fuse", image, call("encode_text", prefix, mask), mask), mask)
        ids = np.full((1, WORDS), tokenizer.pad_id, np.int32)
        ids[0, 0] = tokenizer.cls_id
        tokens: list[int] = []
        while len(tokens) < WORDS and tokenizer.sep_id not in tokens:
            logits = np.array(call("decode", ids, *memory))[0, len(tokens)]
            logits[[tokenizer.cls_id, tokenizer.pad_id]] = -np.inf
            tokens.append(int(logits.argmax()))
            ids[0, len(tokens) : len(tokens) + 1] = tokens[-1]
        expected.append(tokenizer.decode(tokens))
    assert len(set(expected)) > 2
    assert shown[:10] == expected
    assert shown[10:] == expected
    said = {source[index]["id"]: caption for index, caption in enumerate(expected)}
    assert written == [said, said]
    assert results[0] == results[1]
    assert results[0]["attribute_accuracy"] == 0.0  # what a random model says is wrong
