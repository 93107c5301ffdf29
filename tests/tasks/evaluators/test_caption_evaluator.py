"""Captions against those of a plain loop, one picture at a time, and their metrics."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from mplug_jax.config import caption_eval
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.task_examples import PictureExamples, prompt_ids
from mplug_jax.evaluation.captions import caption_metrics
from mplug_jax.generation.beam import BeamConfig, beam_search
from mplug_jax.tasks.evaluators import caption as caption_lib
from mplug_jax.tasks.evaluators.caption import CaptionEvaluator
from mplug_jax.tasks.evaluators.held_out import HeldOut
from tests.tasks.evaluators.small import Call, make_setup, mesh_of, place
from tests.tasks.evaluators.small import random_params as random

COUNT, WORDS, PROMPT = 10, 8, "there is"


@pytest.fixture(scope="module")
def setup(tokenizer):
    return make_setup(tokenizer)


@pytest.fixture(scope="module")
def params(setup):
    return random(setup)


@pytest.fixture(scope="module")
def call(setup, params):
    return Call(setup, params)


def settings(**changes):
    made = caption_eval({}, **{"limit": COUNT, "max_length": WORDS} | changes)
    return {name: value for name, value in made.items() if name not in ("kind", "source")}


def said(folder):
    lines = json.loads((folder / "captions.json").read_text())
    assert all(set(line) == {"image_id", "caption", "picture"} for line in lines)
    return {line["picture"]: line["caption"] for line in lines}


@pytest.mark.slow
def test_captions_are_the_greedy_ones_of_each_picture(setup, params, call, tokenizer, tmp_path):
    source = Scenes("full", "val", 64)
    evaluator = CaptionEvaluator(HeldOut(setup, source, mesh_of(8)), **settings())
    metrics = evaluator(place(params, mesh_of(8)), tmp_path)
    with Image.open(tmp_path / "captions.png") as sheet:
        assert sheet.format == "PNG"

    expected, start = {}, [tokenizer.cls_id]
    examples = PictureExamples(setup.transform)
    empty = {
        "text_ids": np.array([tokenizer.cls_id, tokenizer.sep_id]),
        "text_mask": np.ones(2, bool),
    }
    for index in range(COUNT):
        memory = call.memory_of(empty | examples(source[index]))
        tokens = call.greedy(memory, start, WORDS, tokenizer)
        expected[source[index]["id"]] = tokenizer.decode(tokens)
    assert len(set(expected.values())) > 2
    assert said(tmp_path) == expected
    assert metrics["attribute_accuracy"] == 0.0  # what a random model says is wrong
    references = {source[i]["id"]: source[i]["captions"] for i in range(COUNT)}
    suite = caption_metrics(expected, references, java=False)
    assert {name: metrics[name] for name in suite} == pytest.approx(suite)
    words = np.mean([len(caption.split()) for caption in expected.values()])
    assert metrics["words"] == pytest.approx(words)


@pytest.mark.slow
def test_clips_are_captioned_after_a_prompt_that_is_no_part_of_the_caption(
    tokenizer, params, tmp_path
):
    """From the image tokens alone, by beams of the official procedure."""
    setup = make_setup(tokenizer, frames=2)
    call, mesh = Call(setup, params), mesh_of(2)
    source = Scenes("full", "val", 4, video=True)
    data, start = HeldOut(setup, source, mesh), prompt_ids(tokenizer, PROMPT)
    examples = PictureExamples(setup.transform, 2)
    memories = []
    for index in range(4):
        image = call("encode_image", examples(source[index])["image"][None])
        memories.append((image, np.ones(image.shape[:2], bool)))
    made = settings(memory="image", prompt=PROMPT, limit=0, procedure="official", beams=3)
    metrics = CaptionEvaluator(data, **made)(place(params, mesh), tmp_path)
    assert "cider" in metrics
    assert "attribute_accuracy" not in metrics

    search = BeamConfig(3, WORDS, procedure="official")
    options = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
    memory = [np.concatenate(part) for part in zip(*memories, strict=True)]
    beams = jax.jit(
        lambda p, *m: beam_search(setup.model, p, *m, search, prompt_ids=start, **options).ids
    )(params, *memory)
    best = {source[i]["id"]: tokenizer.decode(np.asarray(row[0])) for i, row in enumerate(beams)}
    assert said(tmp_path) == best
    assert all(PROMPT not in caption for caption in best.values())


def test_a_prompt_too_long_for_the_model_is_refused(setup):
    data = HeldOut(setup, Scenes("full", "val", 4), mesh_of(1))
    with pytest.raises(ValueError, match="exceed the 64 positions"):
        CaptionEvaluator(data, **settings(prompt="red circle " * 40))


@pytest.mark.parametrize(("drawn", "kept"), [(False, True), (False, False), (True, True)])
def test_java_judges_photographs_whose_figures_are_kept(
    setup, params, tmp_path, monkeypatch, drawn, kept
):
    class Photographs:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict:
            picture = np.zeros((8, 8, 3), np.uint8)
            named = {"id": f"{index}.jpg", "image_id": 391895 + index}
            return {**named, "image": picture, "captions": ["a man", "a dog"]}

    asked = []

    def metrics(captions, references, *, java):
        asked.append(java)
        assert drawn or references == {key: ["a man", "a dog"] for key in (0, 1)}
        return {"meteor": 25.0} if java else {}

    monkeypatch.setattr(caption_lib, "caption_metrics", metrics)
    source = Scenes("easy", "val", 2) if drawn else Photographs()
    evaluator = CaptionEvaluator(HeldOut(setup, source, mesh_of(8)), **settings(max_length=2))
    found = evaluator(place(params, mesh_of(8)), tmp_path if kept else None)
    assert asked == [kept and not drawn]
    assert ("meteor" in found) == asked[0]
    if kept and not drawn:
        lines = json.loads((tmp_path / "captions.json").read_text())
        assert [line["image_id"] for line in lines] == [391895, 391896]


def test_domains_are_judged_by_themselves_too():
    truths = ["a man on a horse", "a dog on the beach", "a red kite", "two zebras drink"]
    domains = ["near-domain", "out-domain", "near-domain", "out-domain"]

    records = [
        {"id": f"{i}.jpg", "image_id": i, "captions": [text, f"{text} ."], "domain": domain}
        for i, (text, domain) in enumerate(zip(truths, domains, strict=True))
    ]
    known = {i: caption_lib.Known.of(record) for i, record in enumerate(records)}
    said = dict(enumerate(["a man on a horse", "a cat", "a kite", "two zebras drink"]))
    found = caption_lib.compared(said, known, java=False)
    assert found["cider_near-domain"] != found["cider_out-domain"]
    for domain in set(domains):
        chosen = [i for i in said if domains[i] == domain]
        alone = caption_metrics(
            {i: said[i] for i in chosen},
            {i: [truths[i], f"{truths[i]} ."] for i in chosen},
            java=False,
        )
        assert found[f"cider_{domain}"] == alone["cider"]


def test_pictures_without_references_are_captioned_all_the_same(setup, params, tmp_path, caplog):
    class Bare:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict:
            return {"id": str(index), "image": np.zeros((8, 8, 3), np.uint8), "image_id": index}

    evaluator = CaptionEvaluator(HeldOut(setup, Bare(), mesh_of(8)), **settings())
    assert list(evaluator(place(params, mesh_of(8)), tmp_path)) == ["words"]
    assert list(said(tmp_path)) == ["0", "1"]
    assert "holds no captions to compare with" in caplog.text
