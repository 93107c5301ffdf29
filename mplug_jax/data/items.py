"""One record per question, phrase or other item of which a picture has several."""

import logging
from typing import Any

from mplug_jax.data.records import BadSample, Source, SourceError

logger = logging.getLogger(__name__)


class Items:
    """A view of a source: record `i` is that of the picture, with item number `i` alone.

    Args:
      source: its first records are read once, for how many items each holds; one that cannot be
        used is logged and holds none.
      field: the list that is taken apart: "captions", "questions" or "phrases".
      limit: items at most; 0 takes all.

    Attributes:
      places: (record, item) of each.

    Raises:
      SourceError: no record holds such an item.
    """

    def __init__(self, source: Source, field: str, limit: int = 0):
        self.source, self.field = source, field
        self.places: list[tuple[int, int]] = []
        for index in range(len(source)):
            try:
                count = len(source[index].get(field) or ())
            except BadSample as error:
                logger.warning("left a bad record out: %s", error)
                continue
            self.places += [(index, item) for item in range(count)]
            if limit and len(self.places) >= limit:
                del self.places[limit:]
                break
        if not self.places:
            raise SourceError(f"{source!r} holds no {field}: choose a source that does")

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"Items({self.source!r}, {self.field!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, item = self.places[index]
        found = self.source[record]
        return {**found, self.field: [found[self.field][item]]}
