"""Scalars in TensorBoard's files of events, written by the caller's own thread.

tensorboardX's SummaryWriter hands them to a thread that dies when the disk is full, after which a
run would wait for it for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

FLUSH_SECONDS = 30.0


class Events:
    """Writes into a new file in ``folder``.

    Args:
      folder: made if missing.
      purge_step: what earlier files hold from this step on is not shown any more.

    Raises:
      OSError: of this and every method: the disk is full or gone. The next ``write`` begins
        another file.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._files = folder, 0
        self._writer: EventsWriter | None = None
        self._flushed = 0.0
        self._purge_step = purge_step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds finite values of ``step`` by name."""
        writer, self._writer = self._writer, None  # back in place unless writing fails
        writer = writer or self._begun()
        for name, value in values.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            writer.write_event(event)
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            writer.flush()
            self._flushed = time.monotonic()
        self._writer = writer

    def close(self) -> None:
        """Puts all on disk."""
        if self._writer is not None:
            self._writer.close()

    def _begun(self) -> EventsWriter:
        self._files += 1
        # Two files of a second would have one name.
        suffix = f".{os.getpid()}.{self._files}"
        writer = EventsWriter(str(self._folder / "events"), suffix)
        if self._files == 1:
            purge = Event(
                step=self._purge_step,
                wall_time=time.time(),
                session_log=SessionLog(status=SessionLog.START),
            )
            writer.write_event(purge)
        return writer
