"""metrics.jsonl and results.json as a reader finds them, resumes, rates, and the printed line."""

import io
import json
import math

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mplug_jax.training import metrics, tensorboard
from mplug_jax.training.metrics import MetricsWriter, Progress, Throughput, read_metrics
from tests.training.test_failed_saves import files_limited_to


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]


def write_run(workdir, lines):
    writer = MetricsWriter(workdir)
    for step, scalars in lines:
        writer.write(step, scalars)
    writer.close()


def tensorboard_points(workdir):
    """(tag, step, value) of all scalars, read record by record: length, crc, data, crc."""
    points = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return points


def test_line_holds_step_first_and_plain_numbers(tmp_path):
    write_run(
        tmp_path,
        [(3, {"train/loss": np.float32(0.5), "train/bad": np.int64(2), "train/count": 7})],
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "train/loss": 0.5, "train/bad": 2.0, "train/count": 7}\n'


def test_line_is_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    assert steps(tmp_path) == [1]
    writer.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    values = {"a/nan": math.nan, "a/inf": math.inf, "a/minus": -np.inf}
    write_run(tmp_path, [(1, values)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "a/nan": "nan", "a/inf": "inf", "a/minus": "-inf"}
    (read,) = metrics.read_metrics(tmp_path)
    assert math.isnan(read["a/nan"]) and read["a/inf"] == math.inf and read["a/minus"] == -math.inf


def test_new_run_starts_the_file_afresh(tmp_path):
    write_run(tmp_path, [(0, {"retrieval/r_mean": 1}), (10, {"train/loss": 2.0})])
    write_run(tmp_path, [(10, {"train/loss": 3.0})])
    assert metrics.read_metrics(tmp_path) == [{"step": 10, "train/loss": 3.0}]


@pytest.mark.parametrize("label", ["steps done", "index of the step"])
def test_resumed_run_leaves_the_file_of_one_never_cut(tmp_path, label):
    """Whatever a loop labels its training lines with, a resume at 20 neither loses nor doubles."""
    offset = 1 if label == "steps done" else 0

    def loop(writer, start, stop):
        for step in range(start, stop):
            if step % 10 == 0:
                writer.write(step, {"retrieval/r_mean": float(step)})
            if (step + offset) % 5 == 0:
                writer.write(step + offset, {"train/loss": 100.0 - step})
        writer.close()

    loop(MetricsWriter(tmp_path / "whole"), 0, 40)
    loop(MetricsWriter(tmp_path / "cut"), 0, 33)
    loop(MetricsWriter(tmp_path / "cut", resume_step=20), 20, 40)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    cut = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert sorted(cut) == sorted(whole)


def test_resume_without_new_evaluation_keeps_the_old_one(tmp_path):
    write_run(tmp_path, [(20, {"retrieval/r_mean": 5.0}), (30, {"train/loss": 1.0})])
    writer = MetricsWriter(tmp_path, resume_step=20)
    writer.write(30, {"train/loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [20, 30]


@pytest.mark.parametrize("tail", ['{"step": 20, "train/l', '{"step": 20, "train/loss": 1.0}'])
def test_half_written_last_line_is_cut(tmp_path, tail):
    """Even one that parses: its last number may have lost digits."""
    write_run(tmp_path, [(10, {"train/loss": 1.0})])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [10]
    writer = MetricsWriter(tmp_path, resume_step=40)
    writer.write(50, {"train/loss": 0.5})
    writer.close()
    assert steps(tmp_path) == [10, 50]


def test_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.read_metrics(tmp_path)


def test_reading_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="workdir"):
        metrics.read_metrics(tmp_path)


def test_tensorboard_gets_the_same_finite_scalars(tmp_path):
    write_run(tmp_path, [(1, {"train/loss": 2.0, "train/nan": math.nan}), (2, {"train/loss": 1.5})])
    assert tensorboard_points(tmp_path) == [("train/loss", 1, 2.0), ("train/loss", 2, 1.5)]


def test_disabled_writer_touches_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_results_are_sorted_and_whole(tmp_path):
    path = metrics.write_results(
        tmp_path / "run", 40, "abc", {"retrieval/txt_r1": np.float32(50), "caption/x": math.nan}
    )
    results = json.loads(path.read_text())
    assert list(results.items()) == [
        ("step", 40),
        ("params_sha256", "abc"),
        ("caption/x", "nan"),
        ("retrieval/txt_r1", 50.0),
    ]
    with pytest.raises(ValueError, match="txt_r1"):
        metrics.write_results(tmp_path / "run", 41, "abc", {"txt_r1": 1.0})
    assert json.loads(path.read_text())["step"] == 40
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_leave_out_compilation_and_evaluation():
    clock = Clock()
    throughput = Throughput(images_per_step=64, flops_per_step=1e9, clock=clock)
    clock.now += 30  # compilation
    throughput.restart()
    throughput.count(4)
    clock.now += 2
    with throughput.excluded():
        clock.now += 50
    throughput.count()
    clock.now += 3
    assert throughput.report() == pytest.approx(
        {
            "train/images_per_second": 64.0,
            "train/model_flops_per_second": 1e9,
            "train/steps_per_second": 1.0,
        }
    )
    clock.now += 1
    assert throughput.report() == {}


def test_log_file_gets_one_plain_line_a_report():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    for step in range(1, 101):
        progress.update(step)
    progress.report(
        100,
        {
            "train/loss": 3.14159,
            "train/images_per_second": 128.04,
            "train/model_flops_per_second": 4.2e10,
            "train/steps_per_second": 2.0,
        },
    )
    progress.note("saved")
    progress.close()
    assert stream.getvalue() == (
        "step 100/1000  loss 3.1416  128.0 images/s  42.0 GFLOP/s  ETA 7 min 30 s\nsaved\n"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_gets_a_bar_with_loss_and_eta():
    stream = Terminal()
    progress = Progress(200, start_step=50, stream=stream)
    progress.update(100)
    progress.report(100, {"train/loss": 2.5, "train/steps_per_second": 10.0})
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "50%" in last and "100/200" in last and "loss 2.5000  ETA 10 s" in last


def test_other_processes_are_silent():
    stream = Terminal()
    progress = Progress(10, stream=stream, enabled=False)
    progress.update(1)
    progress.report(1, {"train/loss": 1.0})
    progress.note("x")
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0, "0 FLOP"),
        (950, "950 FLOP"),
        (1234, "1.23 kFLOP"),
        (99_960_000, "100 MFLOP"),
        (999_700_000, "1.00 GFLOP"),
        (4.2e10, "42.0 GFLOP"),
        (1.23e11, "123 GFLOP"),
        (3.5e12, "3.50 TFLOP"),
        (2e16, "20.0 PFLOP"),
    ],
)
def test_format_flops(flops, text):
    assert metrics.format_flops(flops) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (8.4, "8 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (100_800, "1 d 04 h"),
        (math.inf, "unknown"),
    ],
)
def test_format_duration(seconds, text):
    assert metrics.format_duration(seconds) == text


def test_lines_that_a_full_disk_does_not_take_are_counted_and_no_line_is_torn(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0.0)
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    # As on a full disk, where a part of a line may still fit.
    with files_limited_to((tmp_path / "metrics.jsonl").stat().st_size + 5):
        writer.write(2, {"train/loss": 2.0})
        writer.write(3, {"train/loss": 3.0})
    assert writer.lost == 2
    writer.write(4, {"train/loss": 4.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": s, "train/loss": float(s)} for s in (1, 4)]
    assert [step for _, step, _ in tensorboard_points(tmp_path)] == [1, 4]
    first, last = (record.getMessage() for record in caplog.records)
    assert f"Metrics cannot be written into {tmp_path} (File too large)" in first
    assert last == f"2 lines of {tmp_path / 'metrics.jsonl'} could not be written."


def test_what_was_recorded_of_a_step(tmp_path):
    write_run(tmp_path, [(3, {"train/loss": 1.0}), (4, {"vqa/accuracy": 1.0}), (4, {"cap/c": 1.0})])
    writer = MetricsWriter(tmp_path, resume_step=4)
    assert writer.recorded(4, ["vqa", "cap"])
    assert not writer.recorded(4, ["vqa", "cap", "retrieval"])
    assert not writer.recorded(3, ["vqa"])
    writer.close()
