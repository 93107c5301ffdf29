"""Which process is lost, by its beats; with real processes in tests/test_processes.py."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from mplug_jax.config import ConfigError
from mplug_jax.training import peers
from mplug_jax.training.checkpoint import CheckpointError
from mplug_jax.training.peers import Place, Silence, Standstill, _watch, reached, watched


def test_a_process_is_lost_once_its_beats_stay_the_same_for_too_long():
    silence = Silence(timeout=10.0)
    assert silence.lost({"a": "1", "b": "1"}, now=100.0) == {}
    assert silence.lost({"a": "2", "b": "1"}, now=108.0) == {}
    assert silence.lost({"a": "3", "b": "1"}, now=111.0) == {"b": 11.0}
    # A beat clears it: a process that was only slow is no longer counted.
    assert silence.lost({"a": "3", "b": "2"}, now=112.0) == {}


def test_a_process_that_has_come_to_its_end_is_not_lost():
    silence = Silence(timeout=10.0)
    assert silence.lost({"a": "1", "b": "1"}, now=0.0) == {}
    assert silence.lost({"a": "2"}, now=50.0) == {}


def test_all_are_heard_only_once_each_has_sent_a_new_beat():
    silence = Silence(timeout=10.0)
    silence.lost({"a": "1", "b": "1"}, now=5.0)
    silence.lost({"a": "2", "b": "1"}, now=8.0)
    assert silence.all_heard_since(4.0) and not silence.all_heard_since(6.0)
    silence.lost({"a": "2", "b": "2"}, now=9.0)
    assert silence.all_heard_since(6.0) and not silence.all_heard_since(8.5)
    # One that has come to its end is not waited for.
    silence.lost({"b": "2"}, now=10.0)
    assert silence.all_heard_since(8.5)


BATCH, STEP, NEXT = Place(7, "the batch"), Place(8, "the step"), Place(9, "the next batch")


def test_the_process_that_has_come_least_far_is_behind_once_none_gets_on():
    standstill = Standstill(timeout=10.0)
    assert standstill.behind({"a": STEP, "b": BATCH, "c": BATCH}, now=100.0) == {}
    assert standstill.behind({"a": NEXT, "b": BATCH, "c": STEP}, now=109.0) == {}
    assert standstill.behind({"a": NEXT, "b": BATCH, "c": STEP}, now=119.0) == {}
    assert standstill.behind({"a": NEXT, "b": BATCH, "c": STEP}, now=120.0) == {"b": 11.0}


def test_a_process_is_not_behind_while_any_gets_on():
    """A long evaluation or save of one process keeps the others waiting, but only for so long."""
    standstill = Standstill(timeout=10.0)
    for now in range(0, 100, 9):
        assert standstill.behind({"a": Place(now, "a batch"), "b": BATCH}, float(now)) == {}


def test_all_are_behind_if_all_hang_at_the_same_place():
    standstill = Standstill(timeout=10.0)
    assert standstill.behind({"a": STEP, "b": STEP}, now=0.0) == {}
    assert standstill.behind({"a": STEP, "b": STEP}, now=11.0) == {"a": 11.0, "b": 11.0}


def test_a_process_that_came_to_its_end_leaves_time_to_the_others():
    standstill = Standstill(timeout=10.0)
    assert standstill.behind({"a": STEP, "b": BATCH}, now=0.0) == {}
    assert standstill.behind({"b": BATCH}, now=11.0) == {}
    assert standstill.behind({"b": BATCH}, now=22.0) == {"b": 11.0}
    assert standstill.behind({}, now=99.0) == {}


def test_without_a_timeout_none_is_ever_behind():
    standstill = Standstill(timeout=0.0)
    assert standstill.behind({"a": STEP, "b": BATCH}, now=0.0) == {}
    assert standstill.behind({"a": STEP, "b": BATCH}, now=1e9) == {}


class _Store:
    """A dictionary for the coordinator's store, in which process 1 beats or never does again."""

    def __init__(self, beats: bool):
        self._beats, self._count = beats, 0
        self.values = {"mplug/beat/1": "", "mplug/beat/2": "done"}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        self._count += self._beats
        beat = ["process 1 (host there, pid 12)", 1, "the batch of step 3", self._count]
        self.values["mplug/beat/1"] = json.dumps(beat)
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


def _told(store: _Store, me: int, hang_timeout: float) -> tuple[str, bool]:
    told: list[Any] = []

    def end(*what: Any) -> None:
        told.append(what)

    _watch(store, me, Silence(0.3), Standstill(hang_timeout), threading.Event(), end)
    (message,) = told
    return message


def test_the_watch_names_the_silent_process_and_not_those_that_are_done():
    store = _Store(beats=False)
    message, hangs = _told(store, 0, hang_timeout=60.0)
    assert message.startswith("process 1 (host there, pid 12) has been silent for")
    assert "process 0" not in message and "process 2" not in message
    assert not hangs
    assert json.loads(store.values["mplug/beat/0"])[-1] >= 5


def _watched_until(store: _Store, error: Exception, monkeypatch) -> list[str]:
    """What is told when ``error`` ends the work of process 0 of two; the error is raised."""
    told: list[str] = []
    monkeypatch.setattr(peers.distributed.global_state, "client", store)
    monkeypatch.setattr(peers.jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers.jax, "process_index", lambda: 0)
    monkeypatch.setattr(peers, "_end", lambda message, hangs: told.append(message))
    with pytest.raises(type(error)), watched(0.5, hang_timeout=60.0):
        raise error
    return told


# As a broken connection comes out of JAX, and out of the writing of a checkpoint.
BROKEN = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore")
UNSAVED = CheckpointError("The checkpoint of step 3 could not be saved.")
UNSAVED.__cause__ = BROKEN


@pytest.mark.parametrize("error", [BROKEN, UNSAVED])
def test_an_error_waits_for_the_name_of_the_process_that_is_lost(error, monkeypatch, capfd):
    (message,) = _watched_until(_Store(beats=False), error, monkeypatch)
    assert message.startswith("process 1 (host there, pid 12) has been silent for")
    assert capfd.readouterr().err == f"error: {str(error).splitlines()[0]}\n"


@pytest.mark.parametrize("error", [BROKEN, ConfigError("a mistake of the user")])
def test_an_error_is_raised_soon_if_nobody_is_lost(error, monkeypatch):
    assert _watched_until(_Store(beats=True), error, monkeypatch) == []


def test_a_mistake_of_the_user_does_not_wait_for_the_others(monkeypatch):
    assert _watched_until(_Store(beats=False), ConfigError("wrong"), monkeypatch) == []


@pytest.fixture
def at_the_third_step(monkeypatch):
    monkeypatch.setattr(peers, "_place", Place(0, "its start"))
    reached("the batch of step 3")
    reached("step 3")


def test_the_watch_names_the_process_that_hangs_and_what_the_others_wait_at(at_the_third_step):
    message, hangs = _told(_Store(beats=True), 0, hang_timeout=0.5)
    assert "process 1 (host there, pid 12) has not got beyond the batch of step 3 for" in message
    assert "the others wait at step 3" in message and "--hang_timeout" in message
    assert "process 0" not in message and "process 2" not in message
    assert not hangs


def test_a_process_that_hangs_is_told_so_itself(monkeypatch):
    monkeypatch.setattr(peers, "_place", Place(0, "its start"))
    message, hangs = _told(_Store(beats=True), 3, hang_timeout=0.5)
    assert message.startswith("process 3 (") and "its start" in message
    assert hangs
