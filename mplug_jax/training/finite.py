"""What becomes of a loss or gradient that is no number: the step is left out, or the run ends."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is no longer a number."""


class FiniteCheck:
    """Looks at the metrics of each step when the next one has been started, or sooner if asked.

    Args:
      max_skipped: so many steps in a row that are no number end the run; at 0 the first one does.
        The compiled step leaves the state as it was exactly when this is above 0.
      workdir: of the run, for the command that replays a batch.
      see: gets (step, values of the metrics, ids) of each step that is finite.

    Attributes:
      skipped: steps left out since the run started or continued.
    """

    def __init__(
        self,
        max_skipped: int,
        workdir: str,
        see: Callable[[int, Mapping[str, float], Sequence[Any]], None],
    ):
        self.max_skipped, self.skipped = max_skipped, 0
        self._workdir, self._see = workdir, see
        self._in_a_row = 0
        self._pending: tuple[int, Mapping[str, jax.Array], Sequence[Any]] | None = None

    def follow(self, step: int, metrics: Mapping[str, jax.Array], ids: Sequence[Any]) -> None:
        """A step has been started, so that the one before can be waited for: ``settle``.

        Args:
          ids: ``image_id`` of the batch's records on this host, for the message.
        """
        self.settle()
        self._pending = step, metrics, ids

    def settle(self) -> None:
        """Waits for the last step, and counts it if it was no number.

        Raises:
          NonFiniteError: with the step, the terms that are not finite and the ids.
        """
        if self._pending is None:
            return
        (step, metrics, ids), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self._in_a_row = 0
            self._see(step, values, ids)
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row < self.max_skipped:
            return
        broken = ", ".join(f"{n}={v}" for n, v in values.items() if not math.isfinite(v))
        skips = f" It is the last of {self._in_a_row} skipped in a row." if self.max_skipped else ""
        raise NonFiniteError(
            f"step {step}: {broken}.{skips} Nothing was saved after it; the last checkpoint is "
            "intact. Lower config.optimizer.lr, lengthen warmup_steps, or clip more tightly with "
            "clip_norm (and continue with --allow_config_change). What is wrong in which record: "
            f"{replay_command(self._workdir, step)}\nThe image_id of the batch's records: "
            f"{', '.join(map(str, ids))}."
        )


def replay_command(workdir: str, step: int) -> str:
    """The command that shows the batch of a step again (``mplug_jax/replay.py``)."""
    folder = shlex.quote(workdir)
    config = shlex.quote(str(Path(workdir) / "config.json"))
    return f"python -m mplug_jax.replay --config={config} --workdir={folder} --step={step}"
