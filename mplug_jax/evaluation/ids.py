"""Predictions and truths belong together by id, in whatever order they come."""

from collections.abc import Hashable, Mapping
from typing import Any

SHOWN = 5


def common_ids(
    predictions: Mapping[Hashable, Any], truths: Mapping[Hashable, Any], what: str
) -> list[Hashable]:
    """The ids of both in an order that depends on nothing but the ids.

    Args:
      predictions: what the model gave, by id.
      truths: what is right, by the same ids.
      what: the noun of a prediction, for messages.

    Raises:
      ValueError: there is nothing to score, or an id is on one side alone; names the ids.
    """
    if not truths:
        raise ValueError(f"there is no {what} to score: the truths are empty")
    unknown = [key for key in predictions if key not in truths]
    if unknown:
        raise ValueError(f"{_listed(unknown, what)} of unknown id: nothing to compare with")
    missing = [key for key in truths if key not in predictions]
    if missing:
        raise ValueError(
            f"{_listed(missing, what)} missing; a score over the others would not be comparable"
        )
    return sorted(truths, key=lambda key: (str(type(key)), key))


def _listed(keys: list[Hashable], what: str) -> str:
    shown = ", ".join(repr(key) for key in keys[:SHOWN])
    more = ", ..." if len(keys) > SHOWN else ""
    return f"{len(keys)} {what}{'s' if len(keys) > 1 else ''} ({shown}{more})"
