"""AdamW with per-parameter rates, decay and freezing given by ordered patterns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mplug_jax.config import ConfigError
from mplug_jax.training.schedules import learning_rate_schedule
from mplug_jax.training.state import path_name

SETTINGS = ("lr", "weight_decay", "freeze")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How one parameter is trained."""

    lr: float
    weight_decay: float
    freeze: bool


def policies(params: Any, config: Mapping[str, Any]) -> Any:
    """The Policy of every parameter.

    ``config.rules`` is an ordered list of (pattern, settings). For each setting (``lr``,
    ``weight_decay``, ``freeze``) the first rule that matches the parameter's path
    ('visual_encoder/blocks/mlp/up/kernel', ``re.search``) and names the setting decides; else
    ``config.lr``, ``config.weight_decay`` and False hold.

    Raises:
      ConfigError: a pattern that is no regular expression, matches nothing, or an unknown setting.
    """
    rules = _compiled(config["rules"])
    defaults = {"lr": config["lr"], "weight_decay": config["weight_decay"], "freeze": False}
    used: set[str] = set()

    def policy(path: tuple[Any, ...], _: Any) -> Policy:
        values: dict[str, Any] = {}
        name = path_name(path)
        for pattern, settings in rules:
            if pattern.search(name):
                used.add(pattern.pattern)
                values = {**settings, **values}
        return Policy(**{**defaults, **values})

    tree = jax.tree_util.tree_map_with_path(policy, params)
    unused = [pattern.pattern for pattern, _ in rules if pattern.pattern not in used]
    if unused:
        raise ConfigError(
            f"config.optimizer.rules: pattern {unused[0]!r} matches no parameter. Paths look like "
            "'visual_encoder/blocks/mlp/up/kernel'; top-level names: " + ", ".join(params) + "."
        )
    return tree


def _compiled(
    rules: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    compiled = []
    for pattern, settings in rules:
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ConfigError(
                f"config.optimizer.rules: {pattern!r} sets {unknown[0]!r}; "
                f"settings are: {', '.join(SETTINGS)}."
            )
        try:
            compiled.append((re.compile(pattern), dict(settings)))
        except re.error as error:
            raise ConfigError(
                f"config.optimizer.rules: {pattern!r} is no regular expression ({error})."
            ) from error
    return compiled


def make_optimizer(
    params: Any, config: Mapping[str, Any], total_steps: int
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, learning rates; frozen leaves untouched.

    Args:
      params: parameters or their shapes; only paths are used.
      config: the settings of ``config.optimizer``; ``clip_norm`` 0 turns clipping off.
    """
    tree = policies(params, config)
    leaves = jax.tree.leaves(tree)
    decays = sorted({p.weight_decay for p in leaves} - {0.0})
    rates = sorted({p.lr for p in leaves})

    def select(choose: Any) -> Any:
        return jax.tree.map(choose, tree)

    steps = [optax.scale_by_adam(config["b1"], config["b2"], config["eps"])]
    steps += [
        optax.add_decayed_weights(decay, mask=select(lambda p, d=decay: p.weight_decay == d))
        for decay in decays
    ]
    steps += [
        optax.masked(
            optax.scale_by_learning_rate(learning_rate_schedule(config, rate, total_steps)),
            select(lambda p, r=rate: p.lr == r),
        )
        for rate in rates
    ]
    optimizer = optax.chain(*steps)
    if any(p.freeze for p in leaves):
        labels = select(lambda p: "frozen" if p.freeze else "trained")
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    if config["clip_norm"] > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config["clip_norm"]), optimizer)
    return optimizer


def stop_frozen(params: Any, config: Mapping[str, Any]) -> Any:
    """Cuts the gradient at frozen parameters, so that no backward pass runs through them."""
    return jax.tree.map(
        lambda value, policy: jax.lax.stop_gradient(value) if policy.freeze else value,
        params,
        policies(params, config),
    )


def learning_rates(config: Mapping[str, Any], total_steps: int, step: jax.Array) -> dict:
    """The default rate at a step, for the log."""
    schedule = learning_rate_schedule(config, config["lr"], total_steps)
    return {"learning_rate": jnp.asarray(schedule(step), jnp.float32)}
