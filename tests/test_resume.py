"""A run that was cut and continued ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from mplug_jax import train as train_lib
from mplug_jax.data.pipeline import TrainIterator
from mplug_jax.training.finite import NonFiniteError
from mplug_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RATES = {f"train/{name}_per_second" for name in ("images", "model_flops", "steps")}
STEPS = 6


def get_config() -> ConfigDict:
    """The quickstart with dropout, teacher and queue, small enough to compile in seconds."""
    config = quickstart.get_config()
    config.update({"total_steps": STEPS, "batch_size": 8, "log_every": 1})
    config.update({"eval_every": 0, "checkpoint_every": 3})
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.vision.attention_dropout = 0.1
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"dropout": 0.1, "attention_dropout": 0.1})
    config.model.decoder.depth = 1
    config.model.update({"embed_dim": 16, "scan_unroll": 1})
    config.objectives.update({"momentum": 0.9, "alpha_ramp_steps": 4})
    config.objectives.itc.update({"alpha": 0.4, "queue_size": 24})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.4
    config.data.train = ({**config.data.train[0], "size": 64},)
    config.data.tokenizer.texts = ({**config.data.tokenizer.texts[0], "size": 100},)
    config.evals.retrieval.update({"limit": 8, "rerank": 4})
    config.evals.caption.update({"limit": 8, "max_length": 6})
    return config


def trained(workdir: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl without the wall clock's."""
    lines = [line for line in read_metrics(workdir) if "train/loss" in line]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def digest(workdir: Path) -> str:
    return json.loads((workdir / "results.json").read_text())["params_sha256"]


class Cut(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uncut")
    train_lib.train(get_config(), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(uncut):
    for name in ("config.json", "metrics.jsonl", "results.json", "tokenizer.model"):
        assert (uncut / name).stat().st_size > 0
    for pattern in ("tensorboard/events*", "plots/*.png", "samples/*.png", "checkpoints/6/state"):
        assert list(uncut.glob(pattern)), pattern
    results = json.loads((uncut / "results.json").read_text())
    assert results["step"] == STEPS
    for side in ("txt", "img"):
        assert 0 <= results[f"retrieval/{side}_r1"] <= 100
        assert 0 <= results[f"retrieval/itc_{side}_r1"] <= 100
    assert 0 <= results["caption/attribute_accuracy"] <= 1
    lines = [line for line in read_metrics(uncut) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = {f"train/loss{part}" for part in ("", "_itc", "_itm", "_mlm", "_prefix")}
    assert wanted | RATES <= set(lines[-1])
    total = sum(lines[-1][name] for name in wanted - {"train/loss"})
    assert total == pytest.approx(lines[-1]["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_cut_after_a_checkpoint_and_continued_is_bitwise_the_same(uncut, tmp_path, monkeypatch):
    batch = TrainIterator.__next__
    drawn = 0

    def cut_at_the_fifth(self):
        nonlocal drawn
        drawn += 1
        if drawn == 5:
            raise Cut
        return batch(self)

    monkeypatch.setattr(TrainIterator, "__next__", cut_at_the_fifth)
    with pytest.raises(Cut):
        train_lib.train(get_config(), str(tmp_path))
    monkeypatch.undo()
    assert [line["step"] for line in trained(tmp_path)] == [1, 2, 3, 4]
    train_lib.train(get_config(), str(tmp_path))
    assert digest(tmp_path) == digest(uncut)
    assert trained(tmp_path) == trained(uncut)


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(uncut, tmp_path):
    before = digest(uncut), trained(uncut)
    train_lib.train(get_config(), str(uncut))
    assert (digest(uncut), trained(uncut)) == before


@pytest.mark.slow
def test_a_frozen_encoder_has_no_copy_in_checkpoints_and_the_run_continues(uncut, tmp_path):
    config = get_config()
    config.update({"total_steps": 2, "checkpoint_every": 1, "init_from": str(uncut)})
    config.optimizer.rules += (("^visual_encoder/", {"freeze": True}),)
    train_lib.train(config, str(tmp_path))
    checkpoints = tmp_path / "checkpoints"
    with ocp.StandardCheckpointer() as reader:
        saved = reader.metadata(checkpoints / "2" / "state").item_metadata.tree
    assert saved["params"].keys() - saved["momentum_params"].keys() == {"visual_encoder"}
    once = digest(tmp_path), trained(tmp_path)
    shutil.rmtree(checkpoints / "2")
    train_lib.train(config, str(tmp_path))
    assert (digest(tmp_path), trained(tmp_path)) == once


@pytest.mark.slow
def test_nan_stops_the_run_naming_step_and_term_and_saves_nothing_after(tmp_path, monkeypatch):
    config = get_config()
    config.checkpoint_every = 1
    config.optimizer.lr = 1e30
    config.optimizer.clip_norm = 0.0
    config.optimizer.warmup_steps = 0
    with pytest.raises(NonFiniteError, match=r"step \d+: .*loss_"):
        train_lib.train(config, str(tmp_path))
    broken = [line["step"] for line in trained(tmp_path)]
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(saved, default=0) <= max(broken, default=0)
    assert not (tmp_path / "results.json").exists()


# With STALL set the process waits at its fifth batch, so that it is killed in mid-run.
CONFIG = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_resume import get_config
from mplug_jax.data.pipeline import TrainIterator

if os.environ.get("STALL"):
    batch, drawn = TrainIterator.__next__, []

    def stalling(self):
        drawn.append(None)
        if len(drawn) == 5:
            time.sleep(600)
        return batch(self)

    TrainIterator.__next__ = stalling
"""


def command(workdir: Path, config: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mplug_jax.train",
        f"--config={config}",
        f"--workdir={workdir}",
    ]


@pytest.mark.slow
def test_a_process_killed_for_real_continues_with_the_same_command(uncut, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests")))
    # As many devices as here: the very same program, compiled and run before.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    run = {"cwd": ROOT, "env": environment}
    stalled = {**run, "env": {**environment, "STALL": "1"}}
    victim = subprocess.Popen(command(tmp_path / "cut", config), **stalled)
    saved = tmp_path / "cut" / "checkpoints" / "3"
    deadline = time.monotonic() + 300
    while not saved.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert saved.exists()
    assert not (tmp_path / "cut" / "results.json").exists()
    subprocess.run(command(tmp_path / "cut", config), check=True, **run)
    assert digest(tmp_path / "cut") == digest(uncut)
    assert trained(tmp_path / "cut") == trained(uncut)
