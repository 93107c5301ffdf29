"""Notices when another process of the run has died or hangs, and says which one.

Processes wait for each other in every collective, so one that is lost would let all wait. JAX's own
heartbeat ends them too, by an abort that tells a number at most; this one comes first, tells host
and process id, and ends with an exit status. When the coordinator, process 0, is lost, the
connection to it breaks and JAX aborts the others within a second.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

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

    def lost(self, beats: Mapping[str, str], now: float) -> dict[str, float]:
        """The processes that are lost, with the seconds since their last beat.

        Args:
          beats: name -> last beat of every process at work; one that differs from the one before is
            new.
          now: seconds on a monotonic clock.
        """
        for name, beat in beats.items():
            if self._heard.get(name, (None,))[0] != beat:
                self._heard[name] = (beat, now)
        silent = {name: now - self._heard[name][1] for name in beats}
        return {name: seconds for name, seconds in silent.items() if seconds > self._timeout}


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """Lets a thread send beats and listen to those of the others; does nothing for one process.

    A process that is silent for ``timeout`` seconds ends this one: message, exit status 75.
    """
    store = distributed.global_state.client
    if jax.process_count() == 1 or store is None:
        yield
        return
    me, done = jax.process_index(), threading.Event()
    thread = threading.Thread(target=_watch, args=(store, me, timeout, done, _end), daemon=True)
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Most likely a broken connection: the thread is about to find out which process is lost.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        thread.join(timeout=2 * timeout)
        raise
    finally:
        done.set()
        thread.join(timeout=5.0)
    # Not where an error ends this process: that the others shall hear of.
    store.key_value_set(f"{_KEY}{me}", _DONE, allow_overwrite=True)


def _watch(
    store: Store,
    me: int,
    timeout: float,
    done: threading.Event,
    end: Callable[[str], None],
) -> None:
    """Beats and listens until ``done``; ``end`` gets the message when a process is lost."""
    silence = Silence(timeout)
    name = f"process {me} (host {socket.gethostname()}, pid {os.getpid()})"
    count = 0
    while not done.wait(min(timeout / 5, 5.0)):
        count += 1
        try:
            store.key_value_set(f"{_KEY}{me}", f"{count} {name}", allow_overwrite=True)
            beats = dict(store.key_value_dir_get(_KEY))
        except jax.errors.JaxRuntimeError as error:
            if done.is_set():
                return
            end(f"the coordinator, process 0, does not answer any more ({str(error)[:200]})")
            return
        last = {text.partition(" ")[2]: text for text in beats.values() if text != _DONE}
        if lost := silence.lost(last, time.monotonic()):
            end("; ".join(f"{who} has been silent for {s:.0f} s" for who, s in lost.items()))
            return


def _end(what: str) -> None:
    print(
        f"error: {what}: it died or hangs, and the others cannot go on without it. This process "
        "ends too. The same command, started again on all, continues from the last checkpoint; "
        "--heartbeat_timeout sets the time.",
        file=sys.stderr,
        flush=True,
    )
    # The main thread waits in a collective that will never end, so nothing could be cleaned up.
    os._exit(LOST)
