"""The loop: its order, what it writes, and what a mistake in config or data says.

A stand-in for model and step compiles nothing; test_resume.py trains for real.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import flickr8k, quickstart
from mplug_jax import train as train_lib
from mplug_jax.config import ConfigError
from mplug_jax.data.pipeline import TrainIterator
from mplug_jax.data.records import SourceError
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.train import train
from mplug_jax.training import checkpoint as checkpoint_lib
from mplug_jax.training.checkpoint import Checkpointer, CheckpointError
from mplug_jax.training.finite import NonFiniteError
from mplug_jax.training.metrics import read_metrics
from mplug_jax.training.sharding import MeshError
from mplug_jax.training.workdir import WorkdirError, locked
from tests.small_runs import few_texts

TERMS = ("loss", "loss_itc", "loss_itm", "grad_norm")


def shrunk(config: ConfigDict | None = None) -> ConfigDict:
    """Four steps, a line each, a save and a judgement every second."""
    config = config or quickstart.get_config()
    config.update({"total_steps": 4, "batch_size": 8})
    config.update({"log_every": 1, "eval_every": 2, "checkpoint_every": 2})
    if config.data.train[0]["kind"] == "scenes":
        config.data.train = ({**config.data.train[0], "size": 64},)
        few_texts(config, 128)
    return config


class Recorder:
    """Stands for the parameters, the compiled step and the evaluators; keeps what happened.

    Attributes:
      events: (what, step) in order.
      images: image_id of each batch.
      teachers: whether the teacher equalled the parameters, at each step.
      broken: step at which the ITM loss is not a number.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.images: list[list[int]] = []
        self.teachers: list[bool] = []
        self.broken = -1

    def parameters(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(rng, (8, 8)), "temperature": jax.numpy.ones(())}

    def compile(self, *_: Any) -> tuple[Callable[..., Any], int]:
        return self.step, 1000

    def step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        number = int(state.step) + 1
        self.events.append(("step", number))
        self.images.append(np.asarray(batch["image_id"]).tolist())
        if state.momentum_params is not None:
            pairs = zip(*map(jax.tree.leaves, (state.params, state.momentum_params)), strict=True)
            self.teachers.append(all(np.array_equal(a, b) for a, b in pairs))
        metrics = {name: np.float32(number) for name in TERMS}
        if number == self.broken:
            metrics |= {"loss": np.float32(np.nan), "loss_itm": np.float32(np.nan)}
        return state.replace(step=state.step + 1), metrics

    def evaluators(self, *_: Any) -> dict[str, Callable[..., Any]]:
        return {"retrieval": self.judge}

    def judge(self, params: Any, samples: Path | None) -> dict[str, float]:
        self.events.append(("evaluate", samples is not None))
        return {"txt_r1": 50.0}


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    save, draw = Checkpointer.save, TrainIterator.__next__

    def recorded_save(self, step, state, iterator, metrics):
        recorder.events.append(("save", (step, dict(metrics))))
        save(self, step, state, iterator, metrics)

    def recorded_draw(self):
        recorder.events.append(("draw", None))
        return draw(self)

    monkeypatch.setattr(train_lib, "_compile", recorder.compile)
    monkeypatch.setattr(Pretrain, "init_params", lambda _, rng: recorder.parameters(rng))
    monkeypatch.setattr(Pretrain, "evaluators", recorder.evaluators)
    monkeypatch.setattr(Checkpointer, "save", recorded_save)
    monkeypatch.setattr(TrainIterator, "__next__", recorded_draw)
    return recorder


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def digest(workdir: Path) -> str:
    return json.loads((workdir / "results.json").read_text())["params_sha256"]


def test_the_order_of_a_step_never_changes(recorder, tmp_path):
    config = shrunk()
    config.checkpoint_every = 3
    train(config, str(tmp_path))
    judged = {"retrieval/txt_r1": 50.0}
    assert recorder.events == [
        ("draw", None),
        ("step", 1),
        ("draw", None),
        ("step", 2),
        ("evaluate", False),
        ("draw", None),
        ("step", 3),
        # Not judged at this step: an older metric must not speak for this checkpoint.
        ("save", (3, {})),
        ("draw", None),
        ("step", 4),
        # The end is always judged, with pictures, and saved.
        ("evaluate", True),
        ("save", (4, judged)),
    ]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2, 3, 4, 4]
    assert json.loads((tmp_path / "results.json").read_text())["retrieval/txt_r1"] == 50.0


def test_zero_means_never(recorder, tmp_path):
    config = shrunk()
    config.update({"log_every": 0, "eval_every": 0, "checkpoint_every": 0})
    train(config, str(tmp_path))
    assert [event for event in recorder.events if event[0] == "evaluate"] == [("evaluate", True)]
    assert saved_steps(tmp_path) == [4]
    # The last step is told all the same.
    assert [line["step"] for line in read_metrics(tmp_path)] == [4, 4]


def test_a_longer_run_goes_on_with_the_next_batch(recorder, tmp_path):
    config = shrunk()
    config.total_steps = 10
    train(config, str(tmp_path / "whole"))
    whole, recorder.images = recorder.images, []
    for steps in (4, 10):
        config.total_steps = steps
        train(config, str(tmp_path / "parts"))
    assert recorder.images == whole
    assert len({tuple(batch) for batch in whole}) == 10
    with pytest.raises(ConfigError, match=r"total_steps=6, but .*checkpoints has reached step 10"):
        config.total_steps = 6
        train(config, str(tmp_path / "parts"))


def test_nan_names_step_and_term_and_saves_nothing_after(recorder, tmp_path):
    config = shrunk()
    config.update({"total_steps": 9, "eval_every": 1, "checkpoint_every": 1})
    recorder.broken = 4
    with pytest.raises(NonFiniteError, match=r"step 4: loss=nan, loss_itm=nan\.") as error:
        train(config, str(tmp_path))
    assert str(error.value).endswith(f"records: {', '.join(map(str, recorder.images[3]))}.")
    # What was under way is complete: the newest checkpoint is of the step before.
    assert saved_steps(tmp_path)[-1] == 3
    assert all((tmp_path / f"checkpoints/{s}/state").is_dir() for s in saved_steps(tmp_path))
    assert max(line["step"] for line in read_metrics(tmp_path)) == 3
    # A broken model is not judged.
    assert [e for e in recorder.events if e[0] == "evaluate"] == [("evaluate", False)] * 3
    assert not (tmp_path / "results.json").exists()


def test_a_continued_run_keeps_its_config_unless_a_change_is_allowed(recorder, tmp_path, capsys):
    config = shrunk()
    train(config, str(tmp_path))
    first = (tmp_path / "config.json").read_text()
    config.update({"total_steps": 6, "batch_size": 16})
    recorder.events.clear()
    with pytest.raises(WorkdirError, match=r"\n  batch_size: 8 → 16\n"):
        train(config, str(tmp_path))
    assert recorder.events == []
    assert (tmp_path / "config.json").read_text() == first
    train(config, str(tmp_path), allow_config_change=True)
    assert [step for what, step in recorder.events if what == "step"] == [5, 6]
    assert "  batch_size: 8 → 16\n  total_steps: 4 → 6\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(config.to_json())
    starts = (tmp_path / "environment.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0, 4]


def test_a_second_run_in_a_workdir_is_refused_before_it_writes(recorder, tmp_path):
    with locked(tmp_path), pytest.raises(WorkdirError, match=rf"pid {os.getpid()}\b"):
        train(shrunk(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(recorder, tmp_path):
    config = shrunk()
    train(config, str(tmp_path / "whole"))
    train(config, str(tmp_path / "run"))
    (tmp_path / "run/checkpoints/4/state/_METADATA").write_text("")
    recorder.events.clear()
    train(config, str(tmp_path / "run"))
    assert [step for what, step in recorder.events if what == "step"] == [3, 4]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("failing", [2, 4])
def test_only_the_last_save_ends_a_run_when_it_fails(
    recorder, tmp_path, monkeypatch, caplog, failing
):
    write_checksums = checkpoint_lib.write_checksums

    def full(folder: Path) -> None:
        if folder.name.startswith(str(failing)):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_checksums(folder)

    monkeypatch.setattr(checkpoint_lib, "write_checksums", full)
    config = shrunk()
    if failing == 2:
        train(config, str(tmp_path))
        assert "step 2 could not be saved" in caplog.text
        assert saved_steps(tmp_path) == [4]
    else:
        with pytest.raises(CheckpointError, match=r"step 4 could not .* continues from step 2"):
            train(config, str(tmp_path))
        assert saved_steps(tmp_path) == [2]
        assert not (tmp_path / "results.json").exists()


def test_a_step_that_is_no_number_is_skipped_and_counted(recorder, tmp_path):
    config = shrunk()
    config.max_skipped = 2
    recorder.broken = 3
    train(config, str(tmp_path))
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["train/skipped"] for line in lines] == [0, 0, 1, 1]
    assert np.isnan(lines[2]["train/loss"])


def test_init_from_starts_at_step_0_with_the_parameters_of_another_run(recorder, tmp_path):
    first = shrunk()
    train(first, str(tmp_path / "first"))
    second = shrunk()
    second.seed = 1
    second.objectives.momentum = 0.9
    train(second, str(tmp_path / "alone"))
    assert digest(tmp_path / "alone") != digest(tmp_path / "first")
    second.init_from = str(tmp_path / "first")
    recorder.events.clear()
    recorder.teachers.clear()
    train(second, str(tmp_path / "second"))
    assert digest(tmp_path / "second") == digest(tmp_path / "first")
    assert [step for what, step in recorder.events if what == "step"] == [1, 2, 3, 4]
    # The teacher starts from the same parameters, not from a random start of its own.
    assert recorder.teachers == [True] * 4


def test_init_from_nowhere_is_told(recorder, tmp_path):
    config = shrunk()
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"init_from=.*nowhere: no checkpoint there"):
        train(config, str(tmp_path / "run"))


def test_a_batch_that_the_devices_do_not_divide_is_told_before_anything(tmp_path):
    config = shrunk()
    config.batch_size = 12
    with pytest.raises(MeshError, match=r"batch_size=12 does not divide over the 8 parts"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_impossible_patch_size_is_told(tmp_path):
    config = shrunk()
    config.model.vision.patch_size = (5, 5)
    with pytest.raises(ConfigError, match=r"patch_size=\(5, 5\) does not divide"):
        train(config, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": ({"kind": "scene", "level": "easy"},)}, "unknown kind of data source 'scene'"),
        ({"train": ({"kind": "scenes", "level": "easy"},)}, "needs 'split'"),
        ({"tokenizer": {"kind": "bpe"}}, "tokenizer.kind is 'bpe'"),
        ({"tokenizer": {"vocab_size": 3}}, "vocab_size is 3"),
    ],
)
def test_what_the_data_refuses_is_a_mistake_in_the_config(tmp_path, change, said):
    config = shrunk()
    config.data.update(change)
    with pytest.raises(ConfigError, match=said):
        train(config, str(tmp_path))


def photos(folder: Path, count: int, bad: int = 0, captions: list[str] | None = None) -> Path:
    """A data root with train.json and val.json; the first ``bad`` pictures cannot be decoded."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        if index < bad:
            path.write_bytes(b"not a picture")
    texts = captions or ["a red dog runs", "two cats sleep on a blue mat"]
    items = [{"image": f"{index}.png", "caption": texts} for index in range(count)]
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(items))
    return folder


def on_photos(root: Path | None) -> ConfigDict:
    config = shrunk(flickr8k.get_config())
    config.model.vision.image_size = (32, 32)
    config.data.root = None if root is None else str(root)
    config.data.tokenizer.vocab_size = 60
    config.checkpoint.best_metric = ""
    return config


@pytest.mark.parametrize("root", [None, "nowhere"])
def test_a_missing_data_root_is_told(tmp_path, root):
    with pytest.raises(SourceError, match=r"config\.data\.root is"):
        train(on_photos(root and tmp_path / root), str(tmp_path / "run"))


def test_an_empty_split_is_told(tmp_path):
    root = photos(tmp_path / "photos", 4)
    (root / "train.json").write_text("[]")
    with pytest.raises(SourceError, match=r"train\.json: the list is empty"):
        train(on_photos(root), str(tmp_path / "run"))


def test_a_missing_evaluation_file_is_told_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(train_lib, "_compile", lambda *_: pytest.fail("compiled before"))
    root = photos(tmp_path / "photos", 4)
    (root / "val.json").unlink()
    with pytest.raises(SourceError, match=r"there is no file .*val\.json"):
        train(on_photos(root), str(tmp_path / "run"))


def test_too_many_bad_pictures_stop_the_run(recorder, tmp_path):
    config = on_photos(photos(tmp_path / "photos", 20, bad=4))
    config.update({"total_steps": 4, "batch_size": 64})
    config.data.max_bad_fraction = 0.05
    with pytest.raises(SourceError, match=r"records read could not be used, more than data\.max_b"):
        train(config, str(tmp_path / "run"))


def test_a_few_bad_pictures_are_skipped_counted_and_named(recorder, tmp_path, caplog):
    config = on_photos(photos(tmp_path / "photos", 20, bad=4))
    config.update({"total_steps": 4, "batch_size": 64})
    config.data.max_bad_fraction = 0.4
    train(config, str(tmp_path / "run"))
    counted = [line["train/bad_records"] for line in read_metrics(tmp_path / "run")[:1]]
    assert counted[0] > 0
    named = {word for r in caplog.records for word in r.getMessage().split() if ".png" in word}
    assert {Path(name.strip(":'")).name for name in named} == {f"{i}.png" for i in range(4)}
    # Every row of every batch is a good picture's: bad ones are replaced, not blanked.
    assert {i for batch in recorder.images for i in batch} == set(range(4, 20))
