"""Damaged checkpoints: what is seen, what is told, and what is trained on instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mplug_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_params,
    read_params,
    save_params,
)
from mplug_jax.training.integrity import CHECKSUMS_FILE
from tests.training.small_states import (
    BEST,
    SETTINGS,
    abstract,
    assert_same_bits,
    content,
    iterator,
    kept,
    make_state,
    opened,
    params,
    restored_step,
)


def saved_run(workdir: Path, steps: tuple[int, ...] = (1, 2, 3)) -> Path:
    with opened(workdir, SETTINGS | {"keep_last": len(steps)}) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(params(), step), iterator(), {})
    return workdir / "checkpoints"


def largest(step: Path) -> Path:
    """The file with most of the arrays."""
    return max(step.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "has other bytes than were saved"


def cut(path: Path) -> str:
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    return f"has {len(data) - 1} bytes instead of {len(data)}"


def lose(path: Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [flip, cut, lose])
@pytest.mark.parametrize("which", ["arrays", "iterator", "index"])
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, caplog, damage, which):
    root = saved_run(tmp_path)
    newest = root / "3"
    victim = {
        "arrays": largest(newest),
        "iterator": next(p for p in newest.glob("data/**/*") if p.is_file()),
        "index": newest / "state" / "_METADATA",
    }[which]
    what = damage(victim)
    before = content(newest)
    assert restored_step(tmp_path) == 2
    (warning,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert f"step 3 is damaged ({victim.relative_to(newest)} {what})" in warning
    assert "newest whole one is of step 2" in warning
    assert content(root / "3.damaged") == before
    # Out of the way: training gets to step 3 again, and saves it.
    with opened(tmp_path, SETTINGS | {"keep_last": 3}) as checkpointer:
        checkpointer.save(3, make_state(params(), 3), iterator(), {})
    assert restored_step(tmp_path) == 3
    assert kept(tmp_path) == {1, 2, 3}


def test_damage_twice_at_one_step_keeps_both(tmp_path):
    root = saved_run(tmp_path, (1, 2))
    flip(largest(root / "2"))
    assert restored_step(tmp_path) == 1
    saved_run(tmp_path, (2,))
    shutil.copytree(root / "2", root / "1")
    flip(largest(root / "2"))
    with opened(tmp_path, SETTINGS):
        pass
    assert {p.name for p in root.iterdir()} == {"1", "2.damaged", "2.damaged+"}


def test_two_damaged_ones_in_a_row_are_both_passed_over(tmp_path, caplog):
    root = saved_run(tmp_path)
    (root / "3" / CHECKSUMS_FILE).write_text('{"state/x"')
    (root / "2" / CHECKSUMS_FILE).unlink()
    shutil.rmtree(root / "2" / "state")
    assert restored_step(tmp_path) == 1
    told = " ".join(r.getMessage() for r in caplog.records)
    assert f"step 3 is damaged ({CHECKSUMS_FILE} cannot be read" in told
    assert "step 2 is damaged (state/_METADATA is missing)" in told


def test_if_none_is_whole_it_is_said_and_nothing_is_touched(tmp_path):
    root = saved_run(tmp_path)
    names = {step: largest(root / step).relative_to(root / step) for step in ("1", "2", "3")}
    for step in names:
        flip(root / step / names[step])
    before = content(root)
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path, SETTINGS)
    first, *lines, last = str(error.value).splitlines()
    assert first == f"No checkpoint in {root} is whole:"
    assert lines == [f"  {n}: {names[n]} has other bytes than were saved" for n in ("3", "2", "1")]
    assert "Nothing was changed" in last
    assert content(root) == before


def test_damaged_metrics_of_an_older_checkpoint_do_not_stop_the_run(tmp_path, caplog):
    state, data = make_state(params()), iterator()
    with opened(tmp_path, BEST) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, data, {"retrieval/r_mean": 1.0 / step})
    assert kept(tmp_path) == {1, 2, 3}
    cut(tmp_path / "checkpoints" / "1" / "metrics" / "metrics")
    with opened(tmp_path, BEST) as checkpointer:
        assert checkpointer.latest_step() == 3
    assert kept(tmp_path) == {2, 3}
    assert "step 1 is damaged (metrics/metrics has" in caplog.text


def test_a_checkpoint_without_checksums_is_taken_with_a_warning(tmp_path, caplog):
    root = saved_run(tmp_path, (1, 2))
    (root / "2" / CHECKSUMS_FILE).unlink()
    assert restored_step(tmp_path) == 2
    assert f"{root / '2'} was saved without checksums" in caplog.text


def test_half_written_folders_are_ignored(tmp_path, caplog):
    root = saved_run(tmp_path, (1, 2))
    half = root / "3.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "_METADATA").write_text("{")
    assert restored_step(tmp_path) == 2
    assert "damaged" not in caplog.text


def test_parameters_of_a_damaged_checkpoint_are_not_read(tmp_path):
    trained = saved_run(tmp_path / "run", (1, 2)) / "2"
    converted = save_params(tmp_path / "converted", params())
    for folder in (trained, converted):
        victim = largest(folder)
        flip(victim)
        told = rf"{folder} is damaged: {victim.relative_to(folder)} has other bytes"
        with pytest.raises(CheckpointError, match=told):
            load_params(folder, abstract(params()), (1, 1))
        with pytest.raises(CheckpointError, match=told):
            read_params(folder)
    assert_same_bits(load_params(trained.with_name("1"), abstract(params()), (1, 1))[0], params())
