"""Does a run that is killed again and again, at any moment, end with the bits of one that is not?

    python benchmarks/crash.py [--kills=50] [--seed=0] [--wait] [--keep=folder]

Trains a tiny model with dropout, teacher and queue on drawn scenes, by the real command, and kills
the process (SIGKILL): every second time while a checkpoint is being written, else at a random
moment of its start or of its training. Whenever a run gets to its end, its parameters are compared
with those of an uninterrupted one, and a new run begins. Fails if

- a run does not continue from the newest checkpoint that was complete when it was killed;
- it repeats more than `checkpoint_every` steps. Without `--wait` (`config.checkpoint.wait`)
  training waits for a save only when the next one is due: a run that is killed while a checkpoint
  is being written may then repeat twice as many;
- it ends by itself with an error, or with other parameters.

The table says how many kills fell into which phase, and how many steps were trained in vain.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from configs import quickstart

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5
STEPS = 60
# Seconds after a checkpoint's folder has appeared within which it is usually complete.
SAVE = 0.25
# Checkpoints that a run may complete before it is killed while it writes the next.
SPARED = 3
PHASES = ("starting", "training", "saving")


def get_config() -> ConfigDict:
    """What is trained: the file is its own config."""
    config = quickstart.get_config()
    config.update({"total_steps": STEPS, "batch_size": 8, "log_every": 1})
    config.update({"eval_every": 0, "checkpoint_every": EVERY})
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
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = ConfigDict()
    return config


@dataclasses.dataclass(frozen=True)
class Kill:
    """What one kill cost: the phase it fell into, and the steps trained in vain."""

    phase: str
    lost: int


class Run:
    """A workdir, in which the command is started again and again; ``wait``: for every save."""

    def __init__(self, folder: Path, cache: Path, wait: bool):
        self.folder = folder
        self._wait = wait
        self.log = folder.with_suffix(".log")
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self) -> subprocess.Popen[bytes]:
        """The command, as a person would give it."""
        command = ["-m", "mplug_jax.train", f"--config={__file__}", f"--workdir={self.folder}"]
        command.append(f"--config.checkpoint.wait={self._wait}")
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def newest(self) -> int:
        """Step of the newest complete checkpoint; 0 for none."""
        return max((int(name) for name in self._checkpoints() if name.isdigit()), default=0)

    def most_lost(self, saving: bool) -> int:
        """Steps that a kill may cost at most, while a checkpoint is being written or else."""
        return EVERY if self._wait or not saving else 2 * EVERY

    def saving(self) -> bool:
        """Whether a checkpoint is half-written."""
        return any("orbax-checkpoint-tmp" in name for name in self._checkpoints())

    def trained(self) -> int:
        """The last step that was recorded."""
        lines = _whole_lines(self.folder / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def starts(self) -> list[int]:
        """The steps from which it was started or continued."""
        return [line["step"] for line in _whole_lines(self.folder / "environment.jsonl")]

    def digest(self) -> str:
        """SHA-256 of the parameters at the end."""
        return json.loads((self.folder / "results.json").read_text())["params_sha256"]

    def _checkpoints(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return os.listdir(folder) if folder.is_dir() else []


def _whole_lines(path: Path) -> list[dict[str, int]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_start(run: Run, process: subprocess.Popen[bytes], starts: int) -> None:
    """Waits until training begins, for the time after so many ``starts``, or the process ended."""
    while process.poll() is None and len(run.starts()) == starts:
        time.sleep(0.005)


def wait_for_save(run: Run, process: subprocess.Popen[bytes], draw: random.Random) -> None:
    """Waits until one of the next checkpoints is being written, or the process has ended."""
    wanted = run.newest() + EVERY * draw.randint(0, SPARED)
    while process.poll() is None and not (run.saving() and run.newest() >= wanted):
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, SAVE))


def kill_once(
    run: Run, draw: random.Random, takes: tuple[float, float], aim: str, failures: list[str]
) -> Kill | None:
    """Starts the command and kills it in the phase ``aim``; None if it came to its end first."""
    expected, starts = run.newest(), len(run.starts())
    process = run.start()
    if aim != "starting":
        # What an earlier kill has left half-written is cleared away by then.
        wait_for_start(run, process, starts)
    if aim == "saving":
        wait_for_save(run, process, draw)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.0, takes[aim == "training"]))
    half_written = run.saving()
    process.kill()
    status = process.wait()
    begun = run.starts()[starts:]
    if begun not in ([], [expected]):
        failures.append(f"{run.folder.name}: continued from {begun}, not from step {expected}")
    if status >= 0:
        if status > 0:
            failures.append(f"{run.folder.name}: ended by itself with {status}, see {run.log}")
        return None
    newest, lost = run.newest(), max(run.trained() - run.newest(), 0)
    # A save that has begun needs a moment until its folder is there.
    half_written = half_written or lost > EVERY
    phase = "saving" if half_written and begun else "training" if begun else "starting"
    if phase == "starting":
        lost = 0  # what it lost was counted when it was killed
    if newest < expected:
        failures.append(f"{run.folder.name}: step {expected} was saved, now the newest is {newest}")
    if lost > run.most_lost(phase == "saving"):
        failures.append(f"{run.folder.name}: {lost} steps lost while {phase}")
    return Kill(phase, lost)


def finished(run: Run) -> tuple[float, float]:
    """Lets the run come to its end; the seconds until it trains, and from then on."""
    began, process = time.monotonic(), run.start()
    wait_for_start(run, process, len(run.starts()))
    training = time.monotonic()
    if process.wait() != 0:
        sys.exit(f"the run does not work at all:\n{run.log.read_text()[-2000:]}")
    return training - began, time.monotonic() - training


def benchmark(folder: Path, kills: int, seed: int, wait: bool) -> int:
    """Prints the table; the number of failures."""
    cache, draw = folder / "compiled", random.Random(seed)
    reference = Run(folder / "uncut", cache, wait)
    finished(reference)
    runs = [Run(folder / "run0", cache, wait)]
    takes = finished(Run(folder / "timed", cache, wait))
    print(
        "a run starts in {:.1f} s, programs compiled, and trains for {:.1f} s".format(*takes),
        flush=True,
    )
    done: list[Kill] = []
    failures: list[str] = []
    began = time.monotonic()
    while len(done) < kills and len(failures) < 10:
        run = runs[-1]
        aim = ("saving", "starting", "saving", "training")[len(done) % 4]
        kill = kill_once(run, draw, takes, aim, failures)
        if kill is not None:
            done.append(kill)
            print(f"{len(done)}: {kill.phase}, {kill.lost} steps lost", file=sys.stderr, flush=True)
            continue
        _compare(run, reference, failures)
        runs.append(Run(folder / f"run{len(runs)}", cache, wait))
    finished(runs[-1])
    _compare(runs[-1], reference, failures)
    _report(done, failures, f"{len(runs)} runs", wait, (time.monotonic() - began) / 60)
    return len(failures)


def _report(done: list[Kill], failures: list[str], runs: str, wait: bool, minutes: float) -> None:
    print(f"{'phase':<10}{'kills':>7}{'steps lost: mean':>18}{'max':>5}")
    for phase in (*PHASES, "all"):
        lost = [kill.lost for kill in done if phase in (kill.phase, "all")]
        if lost:
            print(f"{phase:<10}{len(lost):>7}{statistics.mean(lost):>18.1f}{max(lost):>5}")
    print(
        f"{len(done)} kills in {runs} of {STEPS} steps, a checkpoint every {EVERY}, "
        f"{'waited for' if wait else 'not waited for'}, {minutes:.1f} minutes; "
        f"{len(failures)} failures"
    )
    print("".join(f"FAILED {failure}\n" for failure in failures), end="")


def _compare(run: Run, reference: Run, failures: list[str]) -> None:
    if not (run.folder / "results.json").exists():
        failures.append(f"{run.folder.name}: no results")
    elif run.digest() != reference.digest():
        failures.append(f"{run.folder.name}: other parameters than those of the uncut run")


def main() -> None:
    """Reads the arguments; exit status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wait", action="store_true", help="wait for every save")
    parser.add_argument("--keep", type=Path, help="folder for the runs, to look at them later")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(1 if benchmark(folder.absolute(), given.kills, given.seed, given.wait) else 0)


if __name__ == "__main__":
    main()
