"""Does the quickstart learn what the README says, in the time it says?

    python benchmarks/quickstart.py [--workdir=runs/quickstart-benchmark] [--seeds=0,1]

Runs the README's first command for each seed in a process of its own and prints the held-out
figures and the wall-clock time, from start to exit, beside their targets. Exit status 1 on a miss.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "retrieval/txt_r1": 45.0,
    "retrieval/img_r1": 45.0,
    "caption/attribute_accuracy": 0.80,
}
MINUTES = 10.0

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart-benchmark", "Folder for the runs.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds to run.")


def main(_: list[str]) -> None:
    """Runs every seed and prints one table."""
    missed = False
    print(f"{os.cpu_count()} cores")
    print(f"{'seed':<6}{'figure':<32}{'measured':>10}{'target':>10}")
    for seed in _SEEDS.value:
        workdir = Path(_WORKDIR.value) / f"seed{seed}"
        if workdir.exists():
            sys.exit(f"error: {workdir} exists; a timing needs a fresh folder.")
        command = [sys.executable, "-m", "mplug_jax.train", "--config=configs/quickstart.py"]
        command += [f"--workdir={workdir.absolute()}", f"--config.seed={seed}"]
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        minutes = (time.perf_counter() - began) / 60
        results = json.loads((workdir / "results.json").read_text())
        for name, target in TARGETS.items():
            missed |= results[name] < target
            print(f"{seed:<6}{name:<32}{results[name]:>10.3g}{target:>10.3g}")
        for side in ("txt", "img"):
            print(
                f"{seed:<6}{f'retrieval/itc_{side}_r1':<32}{results[f'retrieval/itc_{side}_r1']:>10.3g}"
            )
        missed |= minutes > MINUTES
        print(f"{seed:<6}{'minutes':<32}{minutes:>10.2f}{MINUTES:>10.2f}", flush=True)
    sys.exit(int(missed))


if __name__ == "__main__":
    app.run(main)
