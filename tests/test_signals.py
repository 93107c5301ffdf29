"""Real processes that are asked to end: what they save, how they exit, and how they go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from mplug_jax import train as train_lib
from mplug_jax.training import signals as signals_lib
from mplug_jax.training.integrity import damages
from mplug_jax.training.metrics import read_metrics
from mplug_jax.training.signals import Abandoned, Stop, Stopped, between_batches
from tests import test_resume
from tests.small_runs import contrast_alone
from tests.test_resume import ROOT, command, digest, trained

EVALUATED = 4  # the step of an evaluation before the last
CHECKPOINT = 3
# A job in the background ignores SIGINT from its start.
BEFORE = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def get_config() -> ConfigDict:
    config = contrast_alone(test_resume.get_config())
    config.eval_every = EVALUATED
    return config


# HOLD names the place in which the process tells, by the file MARK, that it is there, and then
# stays for SECONDS at a time.
CONFIG = """
import os, pathlib, time
import jax
from tests.test_signals import get_config
from mplug_jax.data.pipeline import TrainIterator
from mplug_jax.tasks.evaluators.held_out import HeldOut
from mplug_jax.training import checkpoint

drawn = 0

def held(function, after=0, mark=True):
    calls = 0
    def slow(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            if mark:
                pathlib.Path(os.environ["MARK"]).touch()
            time.sleep(float(os.environ["SECONDS"]))
        return function(*args, **kwargs)
    return slow

hold = os.environ.get("HOLD")
if hold == "compilation":
    jax.stages.Lowered.compile = held(jax.stages.Lowered.compile)
if hold == "steps":
    TrainIterator.__next__ = held(TrainIterator.__next__, after=1)
if hold == "data":
    TrainIterator.__next__ = held(TrainIterator.__next__, after=4)
if hold == "evaluation":
    HeldOut.place = held(HeldOut.place, after=1)
if hold == "saving":
    checkpoint.write_checksums = held(checkpoint.write_checksums)
    # A save goes on beside the steps, of which none shall be the last before the signal comes.
    TrainIterator.__next__ = held(TrainIterator.__next__, after=3, mark=False)
"""
RATES = test_resume.RATES


def recorded(workdir: Path) -> list[dict[str, Any]]:
    lines = [{k: v for k, v in line.items() if k not in RATES} for line in read_metrics(workdir)]
    return sorted(lines, key=lambda line: (line["step"], "train/loss" not in line))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uncut")
    train_lib.train(get_config(), str(workdir))
    return workdir


def started(workdir: Path, hold: str, seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """A process that has come to the place ``hold``, and the file of what it says."""
    workdir.mkdir()
    config, mark, told = (workdir.parent / name for name in ("config.py", "mark", "stderr"))
    config.write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    environment |= {"HOLD": hold, "MARK": str(mark), "SECONDS": str(seconds)}
    with told.open("w") as stderr:
        process = subprocess.Popen(
            command(workdir, config), cwd=ROOT, env=environment, stderr=stderr, text=True
        )
    wait_until(lambda: mark.exists() or process.poll() is not None)
    assert process.poll() is None, told.read_text()
    return process, told


def wait_until(happened: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold", "seconds", "number", "steps"),
    [
        ("steps", 0.5, signal.SIGTERM, (1, 2, 3, 4)),
        ("compilation", 600, signal.SIGTERM, ()),
        ("evaluation", 0.5, signal.SIGTERM, (EVALUATED,)),
        ("saving", 3, signal.SIGTERM, (3, 4, 5)),
        ("data", 600, signal.SIGINT, (4,)),
    ],
)
def test_a_run_that_is_asked_to_end_loses_nothing(uncut, tmp_path, hold, seconds, number, steps):
    workdir = tmp_path / "run"
    process, told = started(workdir, hold, seconds)
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    text = told.read_text()
    assert "Traceback" not in text
    assert "tracked_metric" not in text
    assert not (workdir / "results.json").exists()
    if steps:
        name = signal.Signals(number).name
        said = re.search(rf"{name}: the run ended at step (\d+): (.*)\. The same command con", text)
        step = int(said[1])
        assert step in steps
        assert said[2] == "the checkpoint is saved" or step == CHECKPOINT
        assert damages(workdir / "checkpoints" / said[1]) == []
        assert [line["step"] for line in trained(workdir)] == list(range(1, step + 1))
    else:
        assert f"{signal.Signals(number).name}: the run ended at once, nothing new" in text
        assert not list((workdir / "checkpoints").glob("*"))
    train_lib.train(get_config(), str(workdir))
    assert digest(workdir) == digest(uncut)
    assert recorded(workdir) == recorded(uncut)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(uncut, tmp_path):
    workdir = tmp_path / "run"
    process, told = started(workdir, "saving", 600)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "SIGINT" in told.read_text())
    process.send_signal(signal.SIGINT)  # within a second: a launcher's echo of the first
    time.sleep(signals_lib.ECHO + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert "ended at once, asked twice" in told.read_text()
    train_lib.train(get_config(), str(workdir))
    assert digest(workdir) == digest(uncut)


@pytest.fixture
def stop():
    with Stop() as stop:
        stop.begin()
        yield stop


def test_what_is_asked_is_done_at_the_next_boundary_and_handlers_go_back(stop, capfd):
    stop.check()
    between_batches()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in capfd.readouterr().err, 5)
    with pytest.raises(Abandoned):
        stop.check()
    with pytest.raises(Abandoned):
        between_batches()
    with pytest.raises(Stopped) as stopped:
        stop.end(7, saved=True)
    assert stopped.value.code == 143
    assert "SIGTERM: the run ended at step 7: the checkpoint is saved." in capfd.readouterr().err
    stop.__exit__()
    between_batches()
    assert {number: signal.getsignal(number) for number in BEFORE} == BEFORE


def test_waiting_gives_back_what_the_call_gives_or_is_given_up(stop, capfd):
    assert stop.wait_for(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        stop.wait_for(lambda: 1 // 0)
    os.kill(os.getpid(), signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(Abandoned):
        stop.wait_for(lambda: time.sleep(3))
    assert time.monotonic() - began < 2


def test_processes_agree_one_question_late():
    agreement = signals_lib._Agreement()
    assert [agreement.largest(number) for number in (0, 15, 0, 2, 0)] == [0, 0, 15, 0, 2]
    assert jax.device_count() == 8


# Each process asks at every boundary; nothing else makes them wait for each other.
MEMBER = """
import sys
import time
import jax
from mplug_jax.training.signals import Abandoned, Stop

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
with Stop() as stop:
    stop.begin()
    for step in range(10_000):
        try:
            stop.check()
        except Abandoned:
            print(f"ended {step}", flush=True)
            stop.end(step, saved=True)
        if step == 3:
            print("begun", flush=True)
        time.sleep(0.01 * (1 + int(sys.argv[2])))
"""


@pytest.mark.slow
def test_processes_end_at_the_same_step_though_only_one_is_asked(tmp_path):
    script = tmp_path / "member.py"
    script.write_text(MEMBER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    members = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for line in members[1].stdout:  # Gloo's own come before
        if line == "begun\n":
            break
    members[1].send_signal(signal.SIGTERM)
    said = [member.communicate(timeout=120) for member in members]
    assert [member.returncode for member in members] == [143, 143], said
    first, second = (re.search(r"ended (\d+)", out)[1] for out, _ in said)
    assert first == second
    assert f"SIGTERM: the run ended at step {first}: the checkpoint is saved" in said[0][1]
