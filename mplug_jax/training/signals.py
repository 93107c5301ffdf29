"""SIGTERM and SIGINT: the current step is saved and the run ends; a second one ends it at once.

A thread of its own is told of signals by the system, so one is noticed while the main thread
compiles, decodes or waits for a device. What the loop does about it, it does at a boundary: between
steps, between the batches of an evaluation, between the chunks of a rollout, or while it waits for
data. No exception is ever raised into the middle of anything.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mplug_jax.training.peers import reached

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds that threads have to end once all is saved; one that hangs in a read does not.
GRACE = 10.0
# Seconds between looks at whether to go on waiting for data.
POLL = 0.1
# A launcher passes on what the terminal has sent to all of its children already: within so many
# seconds the same signal counts once.
ECHO = 1.0


class Stopped(SystemExit):
    """The run was asked to end, and nothing is lost; ``code`` is 128 and the signal's number."""


class Abandoned(Exception):
    """What the loop was at is not finished, since the run is to end."""


class Stop:
    """A context in which SIGTERM and SIGINT ask the loop to end, or, until it begins, end it.

    All processes of a run end at the same step, whichever of them got the signal. Outside the main
    thread, where Python handles no signals, it does nothing.
    """

    _current: Stop | None = None

    def __init__(self) -> None:
        self._signal = 0  # that this process got
        self._since = 0.0
        self._reason = 0  # signal for which the run ends
        self._begun = False
        self._agreement: _Agreement | None = None
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._timer: threading.Timer | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Stop:
        threading.Thread(target=self._answer, name="data", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            self._install()
        Stop._current = self
        self._undo.callback(setattr, Stop, "_current", None)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._calls.put(sys.exit)
        if self._timer is not None:
            self._timer.cancel()

    def begin(self) -> None:
        """From now on there may be something to save."""
        if jax.process_count() > 1:
            self._agreement = _Agreement()
        self._begun = True

    def check(self) -> None:
        """A boundary, which all processes reach alike.

        Raises:
          Abandoned: the run is to end here.
        """
        asked = self._signal
        self._reason = asked if self._agreement is None else self._agreement.largest(asked)
        if self._reason:
            raise Abandoned

    def wait_for(self, call: Callable[[], T]) -> T:
        """What ``call`` returns or raises; it runs in a thread that outlives the wait.

        Raises:
          Abandoned: the run is to end, and the call has not come back. Never where there are other
            processes, as they have begun the step that the call is for.
        """
        self._calls.put(call)
        while True:
            try:
                value, error = self._answers.get(timeout=POLL)
            except queue.Empty:
                if self._agreement is None:
                    self.check()
                continue
            if error is not None:
                raise error
            return value

    def end(self, step: int, saved: bool) -> NoReturn:
        """Ends the run at ``step``, whose checkpoint is complete; ``saved`` if it is a new one."""
        what = "the checkpoint is saved" if saved else "nothing was newer than the checkpoint"
        what = what if step else "nothing had been trained"
        if jax.process_index() == 0:
            _say(self._reason, f"the run ended at step {step}: {what}. The same command continues.")
        # Threads may hang in a read; nothing that they do matters any more.
        self._timer = end_within(GRACE, 128 + self._reason)
        raise Stopped(128 + self._reason)

    def _answer(self) -> None:
        while True:
            call = self._calls.get()
            try:
                answer = call(), None
            except SystemExit:
                return
            except BaseException as error:
                answer = None, error
            self._answers.put(answer)
            del answer  # a batch, which would be kept until the next one

    def _install(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        thread = threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._undo.callback(thread.join)
        self._undo.callback(os.close, write)
        self._undo.callback(signal.set_wakeup_fd, before)
        for number in SIGNALS:
            # None: a handler that is not Python's, as JAX has for SIGTERM in a run of several.
            old = signal.signal(number, lambda *_: None) or signal.SIG_DFL
            self._undo.callback(signal.signal, number, old)
        thread.start()

    def _watch(self, read: int) -> None:
        """Reads the number of each signal that arrives, until the other end is closed."""
        with open(read, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in SIGNALS:
                    self._receive(number[0])

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if number == self._signal and now - self._since < ECHO:
            return
        if self._signal or not self._begun:
            why = "asked twice" if self._signal else "nothing new to save yet"
            _say(number, f"the run ended at once, {why}. The same command continues.")
            os._exit(128 + number)
        self._signal, self._since = number, now
        _say(number, "the run will end when this step is saved; a second signal ends it at once.")


class _Agreement:
    """The largest number that any process has named, the same on all, known one question late.

    A question waits for nothing: the answer is read at the next one, when it has been there long.
    """

    def __init__(self) -> None:
        count = jax.device_count()
        mesh = jax.make_mesh((count,), ("device",))
        self._split = NamedSharding(mesh, PartitionSpec("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def largest(self, number: int) -> int:
        """Of the numbers that were given the last time; 0 before."""
        mine = np.full(jax.local_device_count(), number, np.int32)
        earlier, self._asked = (
            self._asked,
            self._largest(jax.make_array_from_process_local_data(self._split, mine)),
        )
        return 0 if earlier is None else int(earlier)


def between_batches() -> None:
    """A boundary inside an evaluation or a rollout, which all processes reach alike.

    Raises:
      Abandoned: the training that it belongs to, if any, is to end.
    """
    reached("the next batch of an evaluation or a rollout")
    if Stop._current is not None:
        Stop._current.check()


def _say(number: int, text: str) -> None:
    print(f"{signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)


def end_within(seconds: float, code: int) -> threading.Timer:
    """Ends the process with ``code`` in so many seconds, unless it ends or cancels before."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
    return timer
