"""Which process is lost, by its beats; with real processes in tests/test_processes.py."""

from __future__ import annotations

import threading

from mplug_jax.training.peers import Silence, _watch


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


class _Store:
    """A dictionary for the coordinator's store, in which process 1 never beats again."""

    def __init__(self):
        self.values = {"mplug/beat/1": "7 process 1 (host there, pid 12)", "mplug/beat/2": "done"}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


def test_the_watch_names_the_silent_process_and_not_those_that_are_done():
    store, told = _Store(), []
    _watch(store, 0, 0.3, threading.Event(), told.append)
    (message,) = told
    assert message.startswith("process 1 (host there, pid 12) has been silent for")
    assert "process 0" not in message and "process 2" not in message
    assert int(store.values["mplug/beat/0"].split()[0]) >= 5
