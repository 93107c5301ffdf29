"""Steps whose loss jumps out of the range of the last ones: told and counted, nothing more."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

WINDOW = 64  # losses that a new one is compared with
FEWEST = 16  # before these are there, nothing is a spike
# Of normal noise, the standard deviation is so many times the median absolute deviation.
_SIGMA = 1.4826
# However little losses differ, they may always differ by this part of the highest median so far:
# once a model has learnt all, most steps' are next to nothing and a hard example's is no spike.
_LEAST = 0.01


class SpikeCheck:
    """Compares each loss with median and median absolute deviation of those before it.

    Both hardly move when a single loss jumps; while losses fall, the median lags above them, so
    that a steep descent raises no alarm. A loss that stays high becomes the new range within half
    a window. Of spikes in a row the first is told.

    Args:
      factor: a spike lies more than so many standard deviations above the median; 0: none does.

    Attributes:
      spikes: counted since the run started or continued.
    """

    def __init__(self, factor: float):
        self.spikes = 0
        self._factor = factor
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = False
        self._highest = 0.0

    def see(self, step: int, metrics: Mapping[str, float], ids: Sequence[Any]) -> None:
        """Looks at the metrics of a step, which are finite.

        Args:
          ids: ``image_id`` of the batch's records on this host, for the warning.
        """
        if not self._factor:
            return
        loss = metrics["loss"]
        if len(self._last) >= FEWEST:
            median = statistics.median(self._last)
            deviation = _SIGMA * statistics.median(abs(x - median) for x in self._last)
            self._highest = max(self._highest, abs(median))
            most = median + self._factor * max(deviation, _LEAST * self._highest)
            is_spike = loss > most
            if is_spike and not self._in_a_row:
                logger.warning(
                    "step %d: the loss is %.4g, where the last %d steps let at most %.4g be "
                    "expected. The run goes on. The image_id of the batch's records: %s.",
                    *(step, loss, len(self._last), most),
                    ", ".join(map(str, ids)),
                )
            self.spikes += is_spike
            self._in_a_row = is_spike
        self._last.append(loss)
