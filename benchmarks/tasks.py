"""Does every task learn from a pre-trained checkpoint, in the time that is said?

    python benchmarks/tasks.py --init_from=runs/quickstart [--config=configs/quickstart.py]
        [--workdir=runs/tasks] [--tasks=vqa,grounding]

Fine-tunes each task with ``<config>:<task>`` in a process of its own and prints its held-out figure
after training beside its target, the figure of guessing, and the minutes from start to exit. SCST
starts from the captioning run; its figure must exceed that run's. Exit status 1 on a miss.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0


class Target(NamedTuple):
    """What a task has to reach.

    Attributes:
      figure: as in results.json; least: its target; chance: what guessing gives, and how.
    """

    figure: str
    least: float
    chance: str


TARGETS = {
    "caption": Target("caption/cider", 0.0, "-"),
    "scst": Target("caption/cider", 0.0, "its start"),
    "vqa": Target("vqa/accuracy", 92.0, "about 40, the commonest answer of each type"),
    "retrieval": Target("retrieval/txt_r1", 45.0, "0.4, one of 256"),
    "grounding": Target("grounding/acc@0.5", 90.0, "about 5, the mean box"),
    "nlvr2": Target("nlvr2/accuracy", 80.0, "50"),
    "snli_ve": Target("snli_ve/accuracy", 80.0, "33.3; 50 from the words alone"),
    "video_retrieval": Target("retrieval/txt_r1", 45.0, "0.4, one of 256"),
    "video_qa": Target("vqa/accuracy", 50.0, "25, one of four directions or shapes"),
    "video_caption": Target("caption/cider", 0.0, "-"),
}

_CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "Config with an argument a task.")
_INIT = flags.DEFINE_string("init_from", "runs/quickstart", "The pre-trained run.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/tasks", "Folder for the runs.")
_TASKS = flags.DEFINE_list("tasks", list(TARGETS), "Which tasks, in this order.")


def run(task: str, start: Path) -> tuple[dict[str, float], float]:
    """The results of one fine-tuning and its minutes."""
    workdir = Path(_WORKDIR.value).absolute() / task
    if workdir.exists():
        sys.exit(f"error: {workdir} exists; a timing needs a fresh folder.")
    command = [sys.executable, "-m", "mplug_jax.train", f"--config={_CONFIG.value}:{task}"]
    command += [f"--workdir={workdir}", f"--config.init_from={start}"]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - began) / 60
    return json.loads((workdir / "results.json").read_text()), minutes


def main(_: list[str]) -> None:
    """Runs the tasks and prints one table."""
    unknown = sorted(set(_TASKS.value) - set(TARGETS))
    if unknown:
        sys.exit(f"error: no task {unknown[0]!r}; choose from {', '.join(TARGETS)}.")
    missed = False
    print(f"{os.cpu_count()} cores")
    print(f"{'task':<17}{'figure':<20}{'measured':>9}{'target':>8}{'minutes':>9}  guessing")
    for task in _TASKS.value:
        target, captioned = TARGETS[task], Path(_WORKDIR.value).absolute() / "caption"
        start = captioned if task == "scst" else Path(_INIT.value).absolute()
        results, minutes = run(task, start)
        least = target.least
        if task == "scst":
            least = json.loads((captioned / "results.json").read_text())[target.figure]
        missed |= results[target.figure] < least or minutes > MINUTES
        print(
            f"{task:<17}{target.figure:<20}{results[target.figure]:>9.1f}{least:>8.1f}"
            f"{minutes:>9.2f}  {target.chance}",
            flush=True,
        )
    sys.exit(int(missed))


if __name__ == "__main__":
    app.run(main)
