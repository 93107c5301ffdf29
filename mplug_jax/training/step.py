"""One update: momentum model, loss, gradient (accumulated over micro-batches), optimizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from mplug_jax.config import ConfigError
from mplug_jax.objectives.momentum import ema
from mplug_jax.training.optimizer import learning_rates, policies, stop_frozen
from mplug_jax.training.sharding import split_micro_batches
from mplug_jax.training.state import TrainState, part_of, path_name

Metrics = dict[str, jax.Array]


class Loss(Protocol):
    """A task's loss: (params, momentum_params, extra, batch, rng, step) -> (loss, extra, metrics).

    ``loss`` is a float32 scalar, already a masked mean; ``metrics`` are float32 scalars that are
    averaged over micro-batches.
    """

    def __call__(
        self, params: Any, momentum_params: Any, extra: Any, batch: Any, rng: Any, step: Any
    ) -> tuple[jax.Array, Any, Metrics]: ...


def first_momentum_params(params: Any, optimizer_config: Mapping[str, Any]) -> Any:
    """Copies of the parameters that ``optimizer_config.rules`` do not freeze.

    A frozen parameter never moves, so the teacher's is the student's and needs no memory.
    """
    frozen = traverse_util.flatten_dict(policies(params, optimizer_config))
    return traverse_util.unflatten_dict(
        {
            path: jnp.copy(value)
            for path, value in traverse_util.flatten_dict(params).items()
            if not frozen[path].freeze
        }
    )


def move_teacher(state: TrainState, decay: jax.Array | float, patterns: Sequence[str]) -> Any:
    """The next ``momentum_params``: the EMA, but as before where a pattern matches.

    Raises:
      ConfigError: as ``keep_frozen``.
    """
    own = state.momentum_params
    moved = state.replace(momentum_params=ema(own, part_of(state.params, own), decay))
    # Whole trees: a pattern may match only what the teacher has no copy of.
    return part_of(keep_frozen(state.teacher(), moved.teacher(), patterns), own)


def keep_frozen(old: Any, new: Any, patterns: Sequence[str]) -> Any:
    """``new``, with the parameters whose path a pattern matches (``re.search``) as in ``old``.

    Raises:
      ConfigError: a pattern that is no regular expression, or matches nothing.
    """
    unused = set(patterns)

    def choose(path: tuple[Any, ...], before: Any, after: Any) -> Any:
        matching = {p for p in patterns if re.search(p, path_name(path))}
        unused.difference_update(matching)
        return before if matching else after

    try:
        tree = jax.tree_util.tree_map_with_path(choose, old, new)
    except re.error as error:
        raise ConfigError(
            f"config.objectives.teacher_frozen: {error.pattern!r} is no regular expression "
            f"({error})."
        ) from error
    if unused:
        raise ConfigError(
            f"config.objectives.teacher_frozen: pattern {min(unused)!r} matches no parameter; "
            f"top-level names: {', '.join(old)}."
        )
    return tree


class Gradients(NamedTuple):
    """What one batch says before the optimizer uses it; ``state`` has the moved teacher."""

    state: TrainState
    grads: Any
    extra: Any
    metrics: Metrics


def make_gradients(
    loss: Loss,
    optimizer_config: Mapping[str, Any],
    *,
    accumulate: int,
    momentum: float,
    momentum_warmup: bool,
    teacher_frozen: Sequence[str] = (),
) -> Callable[[TrainState, Any], Gradients]:
    """The first half of ``make_train_step``, whose arguments it takes."""

    def value_and_grad(state: TrainState, extra: Any, batch: Any, rng: jax.Array) -> Any:
        def objective(params: Any) -> Any:
            params = stop_frozen(params, optimizer_config)
            value, new_extra, metrics = loss(params, state.teacher(), extra, batch, rng, state.step)
            return value, (new_extra, {"loss": value, **metrics})

        (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        return grads, *aux

    def accumulated(state: TrainState, batch: Any, rng: jax.Array) -> Any:
        def body(carry: Any, scanned: Any) -> Any:
            grads, extra = carry
            index, micro_batch = scanned
            new_grads, extra, metrics = value_and_grad(
                state, extra, micro_batch, jax.random.fold_in(rng, index)
            )
            return (jax.tree.map(jnp.add, grads, new_grads), extra), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        batches = split_micro_batches(batch, accumulate)
        (grads, extra), metrics = jax.lax.scan(
            body, (zeros, state.extra), (jnp.arange(accumulate), batches)
        )
        grads = jax.tree.map(lambda g: g / accumulate, grads)
        return grads, extra, jax.tree.map(lambda m: m.mean(axis=0), metrics)

    def gradients(state: TrainState, batch: Any) -> Gradients:
        if state.momentum_params is not None:
            decay = momentum
            if momentum_warmup:
                # A young teacher follows closely, or it would teach its random start for long.
                decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            state = state.replace(momentum_params=move_teacher(state, decay, teacher_frozen))
        rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if accumulate == 1:
            grads, extra, metrics = value_and_grad(state, state.extra, batch, rng)
        else:
            grads, extra, metrics = accumulated(state, batch, rng)
        metrics["grad_norm"] = optax.global_norm(grads)
        return Gradients(state, grads, extra, metrics)

    return gradients


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    optimizer_config: Mapping[str, Any],
    *,
    total_steps: int,
    accumulate: int,
    momentum: float,
    momentum_warmup: bool,
    teacher_frozen: Sequence[str] = (),
    skip_non_finite: bool = False,
    offload: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Builds the function that the loop compiles.

    With ``accumulate > 1`` the batch is cut into that many micro-batches whose gradients are
    averaged; contrastive terms then see one micro-batch (and the queue) at a time.
    ``momentum`` is the teacher's EMA decay; with ``momentum_warmup`` it starts near 0.
    ``teacher_frozen``: patterns of parameters that the teacher keeps as they were at the start.
    ``offload``: the optimizer's moments come from the host's memory; the output's sharding brings
    them back.
    ``skip_non_finite``: where loss or gradient are no number, all of the state stays but ``step``.

    Raises:
      ConfigError: when it is traced, for a pattern that cannot be used.
    """
    gradients = make_gradients(
        loss,
        optimizer_config,
        accumulate=accumulate,
        momentum=momentum,
        momentum_warmup=momentum_warmup,
        teacher_frozen=teacher_frozen,
    )

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if offload:
            moments = jax.device_put(state.opt_state, jax.memory.Space.Device)
            state = state.replace(opt_state=moments)
        before = state
        state, grads, extra, metrics = gradients(state, batch)
        metrics |= learning_rates(optimizer_config, total_steps, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(params=params, opt_state=opt_state, extra=extra)
        if skip_non_finite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            state = jax.tree.map(functools.partial(jnp.where, finite), state, before)
        # A skipped step counts too, as its batch is spent: the next one draws and is fed afresh.
        return state.replace(step=state.step + 1), metrics

    return train_step
