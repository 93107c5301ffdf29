"""Notices when a process of the run has died, is stopped or hangs, and says which one.

Processes wait for each other in every collective, so one that is lost would let all wait. JAX's own
heartbeat ends them too, by an abort that tells a number at most; this one comes first, tells host
and process id, and ends with an exit status. When the coordinator, process 0, is lost, the
connection to it breaks and JAX aborts the others within a second.

A process whose main thread hangs, in a read of a dead file system above all, goes on sending
beats. So they tell how far that thread has come (``reached``): if no process gets on any more, the
one that has come least far is what all wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import jax
from jax._src import distributed  # the key-value store of the coordinator has no public name

LOST = 75  # exit status (EX_TEMPFAIL): nothing is wrong with this process; start all again
_KEY = "mplug/beat/"
_DONE = "done"  # the last beat of a process that has come to its end


class Store(Protocol):
    """The part of JAX's distributed client that is used."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Silence:
    """Says which processes have not been heard of for how long.

    Args:
      timeout: seconds after which one counts as lost.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._heard: dict[str, tuple[str, float]] = {}  # name -> last beat, when it was new

    @property
    def interval(self) -> float:
        """Seconds between two beats."""
        return min(self._timeout / 5, 5.0)

    def lost(self, beats: Mapping[str, str], now: float) -> dict[str, float]:
        """The processes that are lost, with the seconds since their last beat.

        Args:
          beats: name -> last beat of every process at work; one that differs from the one before is
            new.
          now: seconds on a monotonic clock.
        """
        before = self._heard
        self._heard = {
            name: before[name] if before.get(name, (None,))[0] == beat else (beat, now)
            for name, beat in beats.items()
        }
        silent = {name: now - when for name, (_, when) in self._heard.items()}
        return {name: seconds for name, seconds in silent.items() if seconds > self._timeout}

    def all_heard_since(self, then: float) -> bool:
        """Whether every process at work has sent a new beat after ``then``."""
        return bool(self._heard) and all(when > then for _, when in self._heard.values())


class Place(NamedTuple):
    """How far the main thread of a process has come.

    All processes of a run pass the same boundaries in the same order, so numbers of several can be
    compared.
    """

    number: int  # boundaries passed
    name: str  # what follows the last one


_place = Place(0, "its start")


def reached(name: str) -> None:
    """Tells the other processes that the main thread of this one is about to do ``name``.

    To be called in the same order by all processes.
    """
    global _place
    _place = Place(_place.number + 1, name)


class Standstill:
    """Says which processes have kept all from going on, and for how long.

    A healthy process waits in a collective for one that hangs, so nobody passes a boundary any
    more, and the one that hangs has passed the fewest. As long as any of them passes one, it is
    only slow.

    Args:
      timeout: seconds without any progress that are too many; 0: none are.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._places: dict[str, Place] = {}
        self._since = 0.0

    def behind(self, places: Mapping[str, Place], now: float) -> dict[str, float]:
        """The processes that have come least far, with the seconds since anyone got on.

        Args:
          places: name -> place of every process at work.
          now: seconds on a monotonic clock.
        """
        if places != self._places:
            self._places, self._since = dict(places), now
        seconds = now - self._since
        if not places or not self._timeout or seconds <= self._timeout:
            return {}
        least = min(place.number for place in places.values())
        return {name: seconds for name, place in places.items() if place.number == least}


@contextlib.contextmanager
def watched(timeout: float, hang_timeout: float) -> Iterator[None]:
    """Lets a thread send beats and listen to those of the others; does nothing for one process.

    A process that is silent for ``timeout`` seconds ends this one: message, exit status 75. So does
    one whose main thread has kept all waiting for ``hang_timeout`` seconds (0: for ever).
    """
    store = distributed.global_state.client
    if jax.process_count() == 1 or store is None:
        yield
        return
    me, done = jax.process_index(), threading.Event()
    silence, standstill = Silence(timeout), Standstill(hang_timeout)
    thread = threading.Thread(
        target=_watch, args=(store, me, silence, standstill, done, _end), daemon=True
    )
    thread.start()
    try:
        yield
    except Exception as error:
        if not _ours(error):
            # It may be a connection that broke, which JAX raises as a ValueError too.
            print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
            _hear_from_all(thread, silence)
        raise
    finally:
        done.set()
        thread.join(timeout=5.0)
    # Not where an error ends this process: that the others shall hear of.
    store.key_value_set(f"{_KEY}{me}", _DONE, allow_overwrite=True)


def _ours(error: BaseException) -> bool:
    """Whether the error and all that caused it were raised for people, not by a library."""
    told = type(error).__module__.startswith(("mplug_jax.", "__main__"))
    return told and (error.__cause__ is None or _ours(error.__cause__))


def _hear_from_all(thread: threading.Thread, silence: Silence) -> None:
    """Waits until all are known to be alive; if one is not, the thread ends this process."""
    # What is heard later than this was sent after now: a beat is sent and read an interval apart.
    then = time.monotonic() + 2 * silence.interval
    while thread.is_alive() and not silence.all_heard_since(then):
        time.sleep(silence.interval / 4)


def _watch(
    store: Store,
    me: int,
    silence: Silence,
    standstill: Standstill,
    done: threading.Event,
    end: Callable[[str, bool], None],
) -> None:
    """Beats and listens until ``done``; ``end`` gets the message when a process is lost.

    With it ``end`` is told whether it is this process that hangs.
    """
    name = f"process {me} (host {socket.gethostname()}, pid {os.getpid()})"
    count = 0
    while not done.wait(silence.interval):
        count += 1
        try:
            beat = json.dumps([name, *_place, count])
            store.key_value_set(f"{_KEY}{me}", beat, allow_overwrite=True)
            told = dict(store.key_value_dir_get(_KEY))
        except jax.errors.JaxRuntimeError as error:
            if done.is_set():
                return
            end(f"the coordinator, process 0, does not answer any more ({str(error)[:200]})", False)
            return
        beats = {text: json.loads(text) for text in told.values() if text != _DONE}
        places = {who: Place(*place) for who, *place, _ in beats.values()}
        now = time.monotonic()
        lost = silence.lost({who: text for text, (who, *_) in beats.items()}, now)
        behind = standstill.behind(places, now)
        if not lost and not behind:
            continue
        message = _silent(lost) if lost else _hanging(behind, places)
        if me == 0:
            # The connections break when the coordinator ends, so the others shall be quicker.
            time.sleep(2 * silence.interval)
        end(message, name in behind)
        return


def _silent(lost: Mapping[str, float]) -> str:
    whom = "; ".join(f"{who} has been silent for {s:.0f} s" for who, s in lost.items())
    return f"{whom}: it died or is stopped (--heartbeat_timeout sets the time)"


def _hanging(behind: Mapping[str, float], places: Mapping[str, Place]) -> str:
    told = [
        f"{who} has not got beyond {places[who].name} for {s:.0f} s" for who, s in behind.items()
    ]
    if others := {place.name for who, place in places.items() if who not in behind}:
        told.append(f"the others wait at {' or '.join(sorted(others))}")
    return f"{'; '.join(told)}: it hangs, or needs longer than --hang_timeout"


def _end(what: str, hangs: bool) -> None:
    print(
        f"error: {what}. No process can go on without the others, so this one ends too. The same "
        "command, started again on all, continues from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    if hangs:
        print("What this process was at, thread by thread:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
    # The main thread waits for what will never come, so nothing could be cleaned up.
    os._exit(LOST)
