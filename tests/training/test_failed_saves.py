"""Saves that fail, and what is deleted when: no moment leaves a run without its checkpoint."""

from __future__ import annotations

import contextlib
import errno
import resource
from typing import Any

import jax
import pytest

from mplug_jax.training import checkpoint as checkpoint_lib
from mplug_jax.training.checkpoint import CheckpointError
from tests.training.small_states import (
    SETTINGS,
    content,
    iterator,
    kept,
    make_state,
    opened,
    params,
    restored_step,
)


def test_no_checkpoint_is_deleted_before_its_successor_is_complete(tmp_path, monkeypatch):
    seen = []
    settings = SETTINGS | {"keep_last": 1}

    def last_act_of_a_save(folder):
        # All is written but the name: the one before must be whole and in place.
        seen.append((folder.name.split(".")[0], kept(tmp_path)))
        write_checksums(folder)

    write_checksums = checkpoint_lib.write_checksums
    monkeypatch.setattr(checkpoint_lib, "write_checksums", last_act_of_a_save)
    with opened(tmp_path, settings) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(params(), step), iterator(), {})
    assert seen == [("1", set()), ("2", {1}), ("3", {2})]
    assert kept(tmp_path) == {3}
    assert restored_step(tmp_path, settings) == 3


@contextlib.contextmanager
def files_limited_to(size: int):
    """No file of this process can grow beyond ``size`` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax leaves its other writes unfinished when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_cannot_be_written_leaves_training_and_checkpoints_alone(tmp_path, caplog):
    tree = {"noise": jax.random.normal(jax.random.key(0), (50_000,))}
    settings = SETTINGS | {"keep_last": 1}
    with opened(tmp_path, settings) as checkpointer:
        checkpointer.save(1, make_state(tree, 1), iterator(), {})
        checkpointer.wait()
        before = content(tmp_path / "checkpoints" / "1")
        with files_limited_to(1 << 16):
            checkpointer.save(2, make_state(tree, 2), iterator(), {})
            checkpointer.save(3, make_state(tree, 3), iterator(), {})  # goes on after 2 failed
            with pytest.raises(CheckpointError, match=r"step 3 could not .*\(File too large"):
                checkpointer.wait()
        errors = [r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage()]
        assert len(errors) == 1
        assert "of step 2 could not be saved" in errors[0]
        assert "continues from step 1." in errors[0]
        assert kept(tmp_path) == {1}
        assert content(tmp_path / "checkpoints" / "1") == before
        checkpointer.save(4, make_state(tree, 4), iterator(), {})
    # Nothing half-written takes up space.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("where", ["background", "at once"])
def test_a_full_disk_is_told_by_its_own_message(tmp_path, monkeypatch, caplog, where, wait):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    with opened(tmp_path, SETTINGS | {"wait": wait}) as checkpointer:
        if where == "background":
            monkeypatch.setattr(checkpoint_lib, "write_checksums", fail)
        else:
            monkeypatch.setattr(checkpointer._manager, "save", fail)
        checkpointer.save(1, make_state(params(), 1), iterator(), {})
        told = r"step 1 .* \(.*No space left on device\)\. .* continues from its start"
        with pytest.raises(CheckpointError, match=told):
            checkpointer.wait()
        checkpointer.wait()  # told once
        checkpointer.save(2, make_state(params(), 2), iterator(), {})
    # Closing must not hide what ends the training.
    assert "step 2 could not be saved" in caplog.text
    assert kept(tmp_path) == set()
