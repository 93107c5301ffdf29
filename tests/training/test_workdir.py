"""Who may use a workdir, with which config, and what is written down about it."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mplug_jax.config import defaults, retrieval_eval, save_config
from mplug_jax.training.workdir import (
    FREE,
    WorkdirError,
    changes,
    check_config,
    git_revision,
    locked,
    record_start,
)

ROOT = Path(__file__).resolve().parents[2]
SCENES = {"kind": "scenes", "level": "easy", "split": "train", "size": 64}


def settings() -> ConfigDict:
    config = defaults("tiny")
    config.data.train = (SCENES, {**SCENES, "size": 8})
    return config


@pytest.fixture
def run(tmp_path) -> Path:
    """A workdir of the settings above, with a checkpoint."""
    save_config(settings(), tmp_path)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    return tmp_path


def test_the_same_config_is_no_change(run):
    assert check_config(settings(), run, allow_change=False) == {}


def test_a_changed_config_is_refused_key_by_key(run):
    config = settings()
    config.batch_size = 16
    config.optimizer.lr = 2e-4
    config.data.train = (SCENES, {**SCENES, "size": 9}, SCENES)
    config.log_every = 7  # free, so no reason to refuse
    config.init_from = "runs/é"
    with pytest.raises(WorkdirError) as error:
        check_config(config, run, allow_change=False)
    first, *lines, last = str(error.value).splitlines()
    assert str(run) in first
    assert lines == [
        "  batch_size: 1024 → 16",
        "  data.train.1.size: 8 → 9",
        '  data.train.2.kind: (absent) → "scenes"',
        '  data.train.2.level: (absent) → "easy"',
        "  data.train.2.size: (absent) → 64",
        '  data.train.2.split: (absent) → "train"',
        '  init_from: null → "runs/é"',
        "  optimizer.lr: 0.0001 → 0.0002",
    ]
    assert f"--config={run / 'config.json'}" in last
    assert "--allow_config_change" in last
    allowed = check_config(config, run, allow_change=True)
    assert allowed.keys() == {line.split(":")[0].strip() for line in lines} | {"log_every"}
    assert json.loads((run / "config.json").read_text())["batch_size"] == 1024  # not yet begun


def test_what_may_change_freely_is_told_all_the_same(run):
    config = settings()
    config.update({"total_steps": 9, "log_every": 1, "eval_every": 1, "checkpoint_every": 1})
    config.spike_factor = 0.0
    config.data.update({"workers": 3, "threads": 1})
    config.checkpoint.keep_last = 7
    config.mesh.data = 2
    config.optimizer.offload = True
    with config.evals.unlocked():
        config.evals.new = retrieval_eval(SCENES, limit=3, rerank=2)
    changed = check_config(config, run, allow_change=False)
    assert changed["total_steps"] == "100000 → 9"
    assert changed["mesh.data"] == "-1 → 2"
    assert changed["evals.new.limit"] == "(absent) → 3"
    groups = {key if key in FREE else key.split(".")[0] for key in changed}
    assert groups == set(FREE)


def test_a_key_that_only_begins_like_a_free_one_is_not_free(run):
    config = settings()
    config.data.max_bad_fraction = 0.5
    with pytest.raises(WorkdirError, match=r"data\.max_bad_fraction: 0\.01 → 0\.5"):
        check_config(config, run, allow_change=False)


def test_a_setting_that_the_old_config_had_not_heard_of_had_its_default(run):
    path = run / "config.json"
    old = json.loads(path.read_text())
    del old["optimizer"]["schedule"], old["finetune"]
    old["since_removed"] = 1
    path.write_text(json.dumps(old))
    assert changes(old, settings().to_dict())["since_removed"] == "1 → (absent)"
    config = settings()
    config.optimizer.schedule = "constant"
    with pytest.raises(WorkdirError) as error:
        check_config(config, run, allow_change=False)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines == ['  optimizer.schedule: "cosine" → "constant"', "  since_removed: 1 → (absent)"]


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "no config"])
def test_without_a_run_to_continue_any_config_will_do(run, left):
    if left != "no config":
        (run / "checkpoints" / "20").rename(run / "checkpoints" / "20.orbax-checkpoint-tmp")
    if left != "no checkpoint":
        (run / "config.json").unlink()
    config = settings()
    config.batch_size = 2
    assert check_config(config, run, allow_change=False) == {}


@pytest.mark.parametrize("content", ["", "[1]", '{"seed": '])
def test_a_config_that_cannot_be_read_is_not_overlooked(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read .*--allow_config_change"):
        check_config(settings(), run, allow_change=False)
    assert check_config(settings(), run, allow_change=True) == {}


def test_every_start_is_recorded(run, capsys):
    config = settings()
    config.seed = 5
    record_start(config, run, 20, check_config(config, run, allow_change=True))
    assert "  seed: 0 → 5\n" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["seed"] == 5  # the latest accepted
    record_start(config, run, 30, check_config(config, run, allow_change=False))
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30]
    assert [line["changed"] for line in lines] == [{"seed": "0 → 5"}, {}]
    told = lines[1]
    assert (told["seed"], told["pid"], told["host"]) == (5, os.getpid(), socket.gethostname())
    assert told["python"] == platform.python_version()
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert told["packages"][name] == metadata.version(name)
    assert told["devices"].startswith("8 ")


def test_the_revision_of_a_checkout(tmp_path):
    assert git_revision(tmp_path) is None
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*arguments: str) -> str:
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "-am", "one", "v1")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2\n")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_one_run_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(WorkdirError) as error, locked(tmp_path):
            pytest.fail("two runs in one workdir")
        assert f"host {socket.gethostname()}, pid {os.getpid()}" in str(error.value)
        assert "--workdir" in str(error.value)
        with locked(tmp_path.parent):  # another workdir
            pass
    with locked(tmp_path):
        pass


def test_a_process_that_was_killed_leaves_no_lock_though_its_child_lives(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "from mplug_jax.training.workdir import locked\n"
        "with locked(sys.argv[1]):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(WorkdirError, match=rf"pid {holder.pid}\b"), locked(tmp_path):
            pytest.fail("two runs in one workdir")
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        with locked(tmp_path):
            assert f"pid {os.getpid()}" in (tmp_path / "run.lock").read_text()
    finally:
        holder.kill()
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)
