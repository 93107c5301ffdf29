"""Two real processes of four devices each, started by launch/local.sh, against one of eight."""

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

import pytest
from ml_collections import ConfigDict

from mplug_jax.training.metrics import read_metrics
from mplug_jax.training.peers import LOST
from tests.small_runs import contrast_alone, small_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4

pytestmark = pytest.mark.slow


def get_config(objectives: str = "all") -> ConfigDict:
    """Teacher, queue and dropout are on: all that could differ between processes; "itc" is for
    what happens around the steps."""
    config = small_config() if objectives == "all" else contrast_alone(small_config())
    config.update({"total_steps": STEPS, "checkpoint_every": 2, "eval_every": 0})
    config.model.text.update({"dropout": 0.1, "attention_dropout": 0.1})
    config.objectives.update({"momentum": 0.9, "alpha_ramp_steps": 4})
    config.objectives.itc.update({"alpha": 0.4, "queue_size": 24})
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 1})
    return config


ITC = f"{__file__}:itc"


def launched(
    processes: int,
    devices: int,
    command: str,
    *flags: str,
    config: str | Path = __file__,
    **environment: str,
) -> Any:
    """The started launcher, whose output is read once it ends."""
    env = os.environ | {"DEVICES": str(devices), "PYTHON": sys.executable} | environment
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [str(ROOT / "launch/local.sh"), str(processes), command, f"--config={config}", *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(processes: int, devices: int, command: str, *flags: str, config: str = __file__) -> str:
    process = launched(processes, devices, command, *flags, config=config)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return out


def run_alone(devices: int, *flags: str) -> None:
    """A training as it is started without a launcher: nothing goes through sockets."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "mplug_jax.train", f"--config={__file__}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """The last line of each step: a run that repeats steps writes them again."""
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("train/loss")}
        for line in read_metrics(workdir)
        if "train/loss" in line
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("one")
    run_alone(8, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    run(2, 4, "train", f"--workdir={workdir}")
    return workdir


def test_two_processes_train_as_one(one, two):
    expected, got = losses(one), losses(two)
    assert set(got) == set(range(1, STEPS + 1))
    for step, values in expected.items():
        assert got[step] == pytest.approx(values, abs=1e-5), step
    (start,) = [json.loads(line) for line in (two / "environment.jsonl").open()]
    assert (start["processes"], start["devices"][:2]) == (2, "8 ")


def test_two_processes_evaluate_as_one(one, tmp_path):
    """Also: what one process saved, two restore."""
    run(2, 4, "evaluate", f"--checkpoint={one}", f"--workdir={tmp_path}")
    expected = json.loads((one / "results.json").read_text())
    got = json.loads((tmp_path / "results.json").read_text())
    figures = {k: v for k, v in expected.items() if k.startswith(("retrieval/", "caption/"))}
    assert len(figures) > 20 and {k: got[k] for k in figures} == pytest.approx(figures)


def test_one_process_goes_on_with_what_two_have_saved(one, two, tmp_path):
    """From step 2 of the two, on four devices: the same samples follow, none twice, none lost."""
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    (tmp_path / "run/metrics.jsonl").unlink()
    run_alone(4, f"--workdir={tmp_path / 'run'}")
    expected, got = losses(one), losses(tmp_path / "run")
    assert set(got) == {3, 4}
    for step, values in got.items():
        assert values == pytest.approx(expected[step], abs=1e-5), step


def _pids(workdir: Path) -> dict[int, int]:
    """The running training processes of a workdir, by their number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = dict(
                item.split("=", 1)
                for item in (folder / "environ").read_bytes().decode().split("\0")
                if "=" in item
            )
        except (OSError, UnicodeDecodeError):
            continue
        if "mplug_jax.train" in command and f"--workdir={workdir}" in command:
            found[int(variables["JAX_PROCESS_ID"])] = int(folder.name)
    return found


def _first_checkpoint(launcher: Any, workdir: Path, step: int) -> None:
    limit = time.monotonic() + 300
    while not (workdir / f"checkpoints/{step}").exists():
        assert launcher.poll() is None and time.monotonic() < limit
        time.sleep(0.1)


def test_a_signal_to_one_of_two_ends_both_at_the_same_saved_step(tmp_path):
    flags = ("--config.total_steps=5000", "--config.checkpoint_every=20")
    launcher = launched(2, 1, "train", f"--workdir={tmp_path}", *flags, config=ITC, RESTARTS="1")
    try:
        _first_checkpoint(launcher, tmp_path, 20)
        os.kill(_pids(tmp_path)[1], signal.SIGTERM)
        out, _ = launcher.communicate(timeout=120)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    # Asked to end, so the launcher does not start them again.
    assert launcher.returncode == 143, out
    assert out.count("ended with status 143") == 2 and "restart" not in out
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert saved >= 20 and f"step {saved}" in out
    more = f"--config.total_steps={saved + 2}"
    run(2, 1, "train", f"--workdir={tmp_path}", more, config=ITC)
    assert [json.loads(line)["step"] for line in (tmp_path / "environment.jsonl").open()] == [
        0,
        saved,
    ]
    assert set(losses(tmp_path)) == set(range(1, saved + 3))


def test_a_lost_process_is_named_and_the_launcher_starts_all_again(tmp_path):
    flags = ("--config.total_steps=80", "--config.checkpoint_every=20", "--heartbeat_timeout=10")
    launcher = launched(2, 1, "train", f"--workdir={tmp_path}", *flags, config=ITC, RESTARTS="1")
    try:
        _first_checkpoint(launcher, tmp_path, 20)
        victim = _pids(tmp_path)[1]
        os.kill(victim, signal.SIGKILL)
        out, _ = launcher.communicate(timeout=900)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, out
    assert f"pid {victim}) has been silent" in out
    assert "launch/local.sh: process 1 ended with status 137" in out
    assert f"launch/local.sh: process 0 ended with status {LOST}" in out
    assert "init: checkpoint of step" in out
    starts = [json.loads(line)["step"] for line in (tmp_path / "environment.jsonl").open()]
    assert starts[0] == 0 and starts[1] >= 20
    assert set(losses(tmp_path)) == set(range(1, 81))


# Process 1 hangs at its third batch, as in a read of a dead file system. Compilation before it may
# take its time; from then on both know after 10 seconds.
HANGING = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
from mplug_jax.data.pipeline import TrainIterator
from mplug_jax.training.peers import Standstill
from tests.test_processes import get_config as chosen

batch, behind, drawn = TrainIterator.__next__, Standstill.behind, []

def hanging(self):
    drawn.append(None)
    if len(drawn) == 3 and os.environ["JAX_PROCESS_ID"] == "1":
        pathlib.Path({hung!r}).write_text(str(os.getpid()))
        time.sleep(3600)
    return batch(self)

def soon(self, places, now):
    if len(drawn) >= 3:
        self._timeout = 10
    return behind(self, places, now)

def get_config():
    return chosen("itc")

TrainIterator.__next__, Standstill.behind = hanging, soon
"""


def test_a_process_that_hangs_is_named(tmp_path):
    hung, config = tmp_path / "hung", tmp_path / "config.py"
    config.write_text(HANGING.format(root=str(ROOT), hung=str(hung)))
    flags = (f"--workdir={tmp_path / 'run'}", "--hang_timeout=600")
    launcher = launched(2, 1, "train", *flags, config=config)
    try:
        out, _ = launcher.communicate(timeout=900)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == LOST, out
    assert f"pid {hung.read_text()}) has not got beyond the batch of step 3 for " in out
    assert out.count("error: process 1 (host") == 2 and "error: process 0" not in out
    # What it hung in is told.
    assert "in hanging" in out
    for number in (0, 1):
        assert f"launch/local.sh: process {number} ended with status {LOST}" in out
