"""What a run records: metrics.jsonl, TensorBoard events, results.json, and a line for the person.

A line of metrics.jsonl is one JSON object, `step` first: `{"step": 200, "train/loss": 3.1, ...}`.
JSON has no NaN and no infinity, so a value that is not finite is the string "nan", "inf" or
"-inf"; `read_metrics` turns it back.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mplug_jax.training.tensorboard import Events

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"


class MetricsWriter:
    """Appends scalars to metrics.jsonl and to TensorBoard events in `workdir/tensorboard`.

    Args:
      workdir: folder of the run, made if missing.
      resume_step: the step of the restored state; 0 for a run that starts, whose file starts empty.
      enabled: False on every process but the first; then nothing is read or written.

    The lines after `resume_step` and a half-written last line, which a killed run leaves, are
    cut: the continued run writes them again. A line of `resume_step` itself stays, as what the
    step before the checkpoint logged is not computed again, until a line with one of its keys
    replaces it, as the evaluation before the checkpoint is.

    A line that cannot be written, on a full disk above all, ends no run: the first is told, and
    how many there were when the writer is closed.

    Attributes:
      lost: lines that could not be written.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0, *, enabled: bool = True):
        self._enabled = enabled
        self._resume_step = resume_step
        self.lost, self._told = 0, False
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / METRICS_FILE
        self._keep(lambda line: resume_step > 0 and line["step"] <= resume_step)
        purge_step = resume_step + 1 if resume_step else 0
        self._tensorboard = Events(workdir / "tensorboard", purge_step)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record Python, NumPy or JAX scalars of `step`; the line is on disk or lost on return."""
        if not self._enabled:
            return
        values = {key: _number(value) for key, value in scalars.items()}
        line = {"step": int(step)} | {key: _json_value(value) for key, value in values.items()}
        with self._losing(1):
            if self._resume_step and step == self._resume_step:
                self._keep(lambda old: old["step"] != step or values.keys().isdisjoint(old))
            _append(self._path, json.dumps(line, allow_nan=False) + "\n")
        with self._losing(0):
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            self._tensorboard.write(step, finite)

    def recorded(self, step: int, evaluators: Iterable[str]) -> bool:
        """Whether there is a line of `step` with metrics of all these evaluators."""
        if not self._enabled:
            return True
        lines = [line for line in _json_lines(self._path) if line["step"] == step]
        names = {key.partition("/")[0] for line in lines for key in line}
        return names.issuperset(evaluators)

    def close(self) -> None:
        if not self._enabled:
            return
        with self._losing(0):
            self._tensorboard.close()
        if self.lost:
            logger.error("%d lines of %s could not be written.", self.lost, self._path)

    @contextmanager
    def _losing(self, lines: int) -> Iterator[None]:
        """What cannot be written inside is lost, and is told the first time."""
        try:
            yield
        except OSError as error:
            self.lost += lines
            if not self._told:
                logger.error(
                    "Metrics cannot be written into %s (%s). The run goes on without them; free "
                    "some space.",
                    *(self._path.parent, error.strerror or error),
                )
            self._told = True

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the file with the lines that are wanted, atomically."""
        lines = [json.dumps(line) + "\n" for line in _json_lines(self._path) if wanted(line)]
        _write_atomically(self._path, "".join(lines))


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of `workdir/metrics.jsonl` in file order, NaN and infinity as floats.

    A last line cut short by a killed run is left out.

    Raises:
      FileNotFoundError: the folder holds no metrics.jsonl.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is {workdir} the workdir of a run?")
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in line.items()}
        for line in _json_lines(path)
    ]


def write_results(
    workdir: str | Path, step: int, params_sha256: str, metrics: Mapping[str, Any]
) -> Path:
    """Write results.json: `step`, `params_sha256` and metrics named `<evaluator>/<metric>`.

    The file appears whole or not at all.

    Raises:
      ValueError: a metric's name has no evaluator before a slash.
    """
    for name in metrics:
        if "/" not in name.strip("/"):
            raise ValueError(f"metric {name!r} has to be named <evaluator>/<metric>")
    results = {name: _json_value(_number(metrics[name])) for name in sorted(metrics)}
    results = {"step": int(step), "params_sha256": params_sha256, **results}
    path = Path(workdir) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return path


class Throughput:
    """Rates of training since the last report, evaluation and checkpoints excluded.

    Args:
      images_per_step: images in one global batch.
      flops_per_step: model FLOPs of one step over all devices (see `flops.matmul_flops`).
      clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_step: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._images_per_step = images_per_step
        self._flops_per_step = flops_per_step
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin an interval now: call it after the first step, which compiles."""
        self._start = self._clock()
        self._steps = 0

    def count(self, steps: int = 1) -> None:
        """Count steps whose results are, or will be at the report, waited for."""
        self._steps += steps

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        entered = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - entered

    def report(self) -> dict[str, float]:
        """Rates a second of the interval that ends now, by metric name; none for no steps.

        The caller waits for the last step's result first, since JAX runs ahead of Python.
        """
        seconds, steps = self._clock() - self._start, self._steps
        self.restart()
        if steps == 0 or seconds <= 0:
            return {}
        return {
            "train/images_per_second": steps * self._images_per_step / seconds,
            "train/model_flops_per_second": steps * self._flops_per_step / seconds,
            "train/steps_per_second": steps / seconds,
        }


class Progress:
    """Tells a person how training goes: a bar on a terminal, plain lines in a log file.

    Args:
      total_steps, start_step: of the run, and where it starts or continues.
      stream: standard error unless given.
      enabled: False on every process but the first.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._total_steps = total_steps
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show the loss and the rates that `scalars` holds under their metric names."""
        parts = [f"loss {float(scalars['train/loss']):.4f}"] if "train/loss" in scalars else []
        if "train/images_per_second" in scalars:
            parts.append(f"{scalars['train/images_per_second']:.1f} images/s")
        if "train/model_flops_per_second" in scalars:
            parts.append(f"{format_flops(scalars['train/model_flops_per_second'])}/s")
        if scalars.get("train/steps_per_second"):
            left = (self._total_steps - step) / scalars["train/steps_per_second"]
            parts.append(f"ETA {format_duration(left)}")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        else:
            self.note(f"step {step}/{self._total_steps}  " + "  ".join(parts))

    def note(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_flops(flops: float) -> str:
    """Three significant digits and a prefix: 1.23e11 -> "123 GFLOP"."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # 999.5 rounds to a thousand of a prefix, which is one of the next.
        if abs(flops) >= 0.9995 * 10**power:
            digits = flops / 10**power
            return f"{digits:.{_decimals(digits)}f} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def format_duration(seconds: float) -> str:
    """The two largest units: "8 s", "3 min 05 s", "2 h 07 min", "1 d 04 h"."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def _decimals(value: float) -> int:
    magnitude = abs(value)
    return 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def _json_value(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(float(value))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may be missing or end in half a line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    # What follows the last newline was cut short, even where it happens to parse.
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a line of metrics: {text[:80]!r}. "
                "Mend or remove the line, or move the file away."
            ) from error
        parsed.append(line)
    return parsed


def _append(path: Path, line: str) -> None:
    """Adds a line, or raises OSError and leaves the file as it was."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        data = line.encode()
        try:
            # A disk that is nearly full takes a part.
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
