"""Learning rate schedules: a cosine, a constant, and the staircase of the official code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mplug_jax.config import ConfigError

ITERATIONS_PER_UNIT = 100  # of the official warm-up


def official_lr(
    index: int, lr: float, *, epochs: int, warmup_units: int, warmup_lr: float, min_lr: float
) -> float:
    """The rate of a parameter group after the official ``scheduler.step(index)``.

    Indices below ``warmup_units`` are the warm-up, linear from ``warmup_lr`` (-1: before any call,
    as 0); ``warmup_units + e`` is the cosine's value for epoch e, ``min_lr`` from e = epochs on.
    All groups share ``warmup_lr`` and ``min_lr``: one with a lower ``lr`` warms *down* to it.
    (timm's CosineLRScheduler with ``warmup_prefix``, as the official ``scheduler`` makes it.)
    """
    index = max(index, 0)
    if index < warmup_units:
        return warmup_lr + (lr - warmup_lr) * index / warmup_units
    epoch = index - warmup_units
    if epoch >= epochs:
        return min_lr
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def official_index(
    step: jax.Array,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_units: int,
    iterations_per_step: int,
) -> jax.Array:
    """The index that the official loop last gave its scheduler before update ``step``; -1: none.

    The loop calls ``step(i // 100)`` *after* iteration i of epoch 0, if 100 divides i and the
    warm-up lasts, and ``step(warmup_units + e)`` before each later epoch e. An update closes
    ``iterations_per_step`` iterations. After the last epoch the index is ``warmup_units + epochs``.
    """
    iteration = (step + 1) * iterations_per_step - 1
    in_first = jnp.minimum((iteration - 1) // ITERATIONS_PER_UNIT, warmup_units)
    epoch = jnp.minimum(step // steps_per_epoch, epochs)
    return jnp.where(epoch == 0, in_first, warmup_units + epoch)


def _official_schedule(config: Mapping[str, Any], lr: float, total_steps: int) -> optax.Schedule:
    official = dict(config["official"])
    epochs, units = official["epochs"], official["warmup_units"]
    if epochs < 1:
        raise ConfigError(
            "config.optimizer.schedule='official' goes by epochs: set "
            "config.optimizer.official.epochs to their number."
        )
    official["steps_per_epoch"] = official["steps_per_epoch"] or -(-total_steps // epochs)
    limits = {"warmup_lr": config["warmup_lr"], "min_lr": config["min_lr"]}
    # Few enough to be looked up, which keeps the official double precision up to the last cast.
    rates = [
        official_lr(index, lr, epochs=epochs, warmup_units=units, **limits)
        for index in range(units + epochs + 1)
    ]

    def schedule(step: jax.Array) -> jax.Array:
        index = official_index(jnp.asarray(step, jnp.int32), **official)
        return jnp.asarray(rates, jnp.float32)[jnp.maximum(index, 0)]

    return schedule


def learning_rate_schedule(
    config: Mapping[str, Any], lr: float, total_steps: int
) -> optax.Schedule:
    """Rate of each update, by ``config.schedule``.

    - ``cosine``: linear warm-up from ``warmup_lr`` to ``lr``, then cosine to ``min_lr`` at the
      last step.
    - ``constant``: the same warm-up, then ``lr``.
    - ``official``: the staircase of the official loop (see ``official_index``); ``warmup_steps``
      has no say in it.

    In the first two a rate below ``warmup_lr`` or ``min_lr`` (a slow part of the model) starts and
    ends no higher than itself; in the official one it does.

    Raises:
      ConfigError: an unknown schedule, or the official one without its epochs.
    """
    warmup = min(config["warmup_steps"], max(total_steps - 1, 0))
    start = min(config["warmup_lr"], lr)
    match config["schedule"]:
        case "cosine":
            decay_steps, end = max(total_steps, warmup + 1), min(config["min_lr"], lr)
            return optax.warmup_cosine_decay_schedule(start, lr, warmup, decay_steps, end)
        case "constant":
            # optax.warmup_constant_schedule would stay at the start without a warm-up.
            rise = optax.linear_schedule(start, lr, warmup)
            return optax.join_schedules([rise, optax.constant_schedule(lr)], [warmup])
        case "official":
            return _official_schedule(config, lr, total_steps)
        case unknown:
            raise ConfigError(
                f"config.optimizer.schedule={unknown!r} is unknown; choose cosine, constant or "
                "official."
            )
