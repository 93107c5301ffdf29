"""What tells one fine-tuning task from another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mplug_jax.tasks.forward import Forward
from mplug_jax.tasks.setup import Setup

Array = jax.Array
LossParts = tuple[Array, Array, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A fine-tuning task, as ``Finetune`` runs it.

    Attributes:
      examples: the maker of training examples for a setup.
      loss: (setup, forward, teacher or None, batch, step) -> (loss sum, count, metrics);
        ``forward`` and ``teacher`` call the model and its momentum copy.
      teaches: whether the loss has a use for a teacher.
      rollout: (setup, mesh) -> what is made of each batch with the current parameters before the
        update, or None; see ``tasks/scst.py``.
    """

    examples: Callable[[Setup], Any]
    loss: Callable[[Setup, Forward, Forward | None, Any, Array], LossParts]
    teaches: bool = False
    rollout: Callable[[Setup, Any], Any] | None = None
