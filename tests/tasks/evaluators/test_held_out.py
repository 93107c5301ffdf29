"""Batches over the mesh, sheets, and the evaluators that a config names."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from mplug_jax import validation
from mplug_jax.config import caption_eval, grounding_eval, retrieval_eval, vqa_eval
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.task_examples import PictureExamples
from mplug_jax.tasks.evaluators import EVALUATORS, build_evaluators
from mplug_jax.tasks.evaluators.held_out import SHEET_ROWS, HeldOut, Sheet
from tests.tasks.evaluators.small import Broken, make_setup, mesh_of

SCENES = {"kind": "scenes", "level": "easy", "split": "val", "size": 8}


@pytest.fixture(scope="module")
def setup(tokenizer):
    return make_setup(tokenizer, "grounding")


def test_each_usable_record_comes_once_with_its_own_result(setup):
    data = HeldOut(setup, Broken(Scenes("easy", "val", 80), {2, 70}), mesh_of(8))
    mean = data.compiled(lambda params, batch: params + batch["image"].mean(axis=(1, 2, 3)))
    rows = list(data.each(mean, 1.0, PictureExamples(data.transform), ("image",), limit=75))
    assert [index for index, _, _ in rows] == [i for i in range(75) if i not in (2, 70)]
    for index, example, result in rows:
        picture = data.source[index]["image"]
        np.testing.assert_array_equal(example["image"], picture)
        np.testing.assert_allclose(result, 1 + picture.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("frames", "devices", "pictures", "rows"),
    [(1, 1, 64, 64), (1, 8, 60, 64), (12, 1, 64, 6), (12, 8, 64, 8), (100, 1, 64, 1)],
)
def test_batches_are_smaller_for_clips_and_divide_over_the_devices(
    tokenizer, frames, devices, pictures, rows
):
    data = HeldOut(make_setup(tokenizer, frames=frames), [], mesh_of(devices))
    assert data.rows(pictures) == rows


def test_a_sheet_takes_each_of_the_first_pictures_once_frames_side_by_side(tmp_path):
    sheet = Sheet()
    clip = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in range(7)])
    for number in range(SHEET_ROWS + 3):
        example = {"image": clip, "image_id": np.int32(number)}
        sheet.add(example, f"number {number}")
        assert not sheet.wants(example)
        sheet.add(example, "the same picture again")
    assert sheet.titles == [f"number {i}" for i in range(SHEET_ROWS)]
    shown = sheet.pictures[0]
    assert shown.shape == (8, 32, 3)
    assert shown[0, ::8, 0].tolist() == [0, 2, 4, 6]
    sheet.write(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


@pytest.mark.parametrize("kind", EVALUATORS)
def test_evaluators_take_the_settings_that_a_config_gives(kind):
    given = set(inspect.signature(validation.EVALUATORS[kind]).parameters) - {"source"}
    taken = set(inspect.signature(EVALUATORS[kind]).parameters) - {"data"}
    assert given == taken


def test_evaluators_are_built_by_name(setup):
    config = setup.config
    with config.unlocked():
        config.evals.best = caption_eval(SCENES, limit=4, max_length=8, beams=2)
        config.evals.pairs = retrieval_eval(SCENES, limit=4, rerank=2)
        fields = {"fields": ("questions", "phrases")}
        config.evals.asked = vqa_eval(SCENES | fields, limit=4)
        config.evals.found = grounding_eval(SCENES | fields, limit=4)
    built = build_evaluators(setup, mesh_of(1))
    kinds = {"best": "caption", "pairs": "retrieval", "asked": "vqa", "found": "grounding"}
    assert {name: type(built[name]) for name in built} == {
        name: EVALUATORS[kind] for name, kind in kinds.items()
    }


def test_evaluators_of_one_kind_write_into_folders_of_their_own(tokenizer, monkeypatch, tmp_path):
    written = []

    class Recorder:
        def __init__(self, data, **settings):
            self.limit = settings["limit"]

        def __call__(self, params, samples=None):
            written.append((self.limit, params, samples))
            return {"metric": self.limit}

    monkeypatch.setitem(EVALUATORS, "caption", Recorder)
    setup = make_setup(tokenizer)
    with setup.config.unlocked():
        for limit in (1, 2):
            setup.config.evals[f"part{limit}"] = caption_eval(SCENES, limit=limit, max_length=8)
    first, second = build_evaluators(setup, mesh_of(1)).values()
    assert first("params", tmp_path) == {"metric": 1}
    second("params")
    with setup.config.unlocked():
        del setup.config.evals["part1"]
    (alone,) = build_evaluators(setup, mesh_of(1)).values()
    alone("params", tmp_path)
    assert written == [
        (1, "params", tmp_path / "part1"),
        (2, "params", None),
        (2, "params", tmp_path),
    ]
