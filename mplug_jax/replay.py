"""What one batch of a run did: ``python -m mplug_jax.replay --config=RUN/config.json --workdir=RUN
--step=N``.

The newest whole checkpoint before step N is restored, what lies in between is trained again, and
the batch of step N is looked at: its records, each term of the loss, the gradient norm, the groups
of parameters whose gradients are no numbers, and the records that alone make them so. Nothing is
written into the workdir, which a run may be using meanwhile. One process replays a run of any
number of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.command_line import run_replay
from mplug_jax.config import ConfigError, config_errors
from mplug_jax.tasks import build_task
from mplug_jax.train import (
    first_state,
    gradient_settings,
    jitted_step,
    make_program,
    training_iterator,
)
from mplug_jax.training.checkpoint import WholeCheckpoints
from mplug_jax.training.sharding import jit_on, make_mesh, on_mesh, place_local_batch, replicated
from mplug_jax.training.state import TrainState, path_name
from mplug_jax.training.step import make_gradients
from mplug_jax.validation import validate

# Parts of a parameter's path that name its group: visual_encoder/blocks.
GROUP_DEPTH = 2


class Replayed(NamedTuple):
    """What a batch did.

    Attributes:
      metrics: the terms of the loss, and grad_norm.
      groups: groups of parameters with a gradient that is not finite.
      ids: ``image_id`` of the records, in their order.
      inputs: of those with an input that is not finite.
      culprits: of those that break the loss or the gradient when they are all of a batch.
    """

    metrics: dict[str, float]
    groups: list[str]
    ids: list[int]
    inputs: list[int]
    culprits: list[int]


def replay(config: ConfigDict, workdir: str, step: int) -> Replayed:
    """Computes the batch of ``step`` (from 1) again, and prints what it did.

    Raises:
      ConfigError, MeshError, SourceError, CheckpointError: no such step, or a mistake in the
        config or the data.
    """
    validate(config)
    if not 1 <= step <= config.total_steps:
        raise ConfigError(f"--step={step}: the run has the steps 1 to {config.total_steps}.")
    mesh = make_mesh(config.mesh)
    with config_errors():
        task = build_task(config, workdir)
        rollout = task.rollout(mesh)
    program = make_program(config, task, mesh)
    with contextlib.closing(training_iterator(config, task)) as iterator:
        saved = WholeCheckpoints(workdir, most=step - 1)
        state, start = first_state(config, task, program, saved, iterator)
        update = jitted_step(config, task, mesh, program)
        for number in range(start, step):
            batch = next(iterator)
            if rollout is not None:
                batch = rollout(state.params, batch, number)
            if number < step - 1:
                with on_mesh(mesh):
                    state, _ = update(state, place_local_batch(batch, mesh))
    replayed = _examined(_probe(config, task, mesh), state, batch)
    print(_report(step, start, replayed), flush=True)
    return replayed


Probe = Callable[[TrainState, Mapping[str, np.ndarray]], tuple[dict[str, float], dict[str, bool]]]


def _probe(config: ConfigDict, task: Any, mesh: Mesh) -> Probe:
    """(state, batch) -> (metrics, whether each parameter's gradient is finite)."""
    gradients = make_gradients(task.loss, **gradient_settings(config))

    def compute(state: TrainState, batch: Any) -> Any:
        found = gradients(state, batch)
        return found.metrics, jax.tree.map(lambda g: jnp.isfinite(g).all(), found.grads)

    compiled = jit_on(mesh, compute, replicated(mesh))

    def probe(state: TrainState, batch: Mapping[str, np.ndarray]) -> Any:
        metrics, finite = jax.device_get(compiled(state, place_local_batch(batch, mesh)))
        leaves = jax.tree_util.tree_leaves_with_path(finite)
        by_name = {path_name(path): bool(value) for path, value in leaves}
        return {name: float(value) for name, value in metrics.items()}, by_name

    return probe


def _examined(probe: Probe, state: TrainState, batch: Mapping[str, np.ndarray]) -> Replayed:
    metrics, finite = probe(state, batch)
    groups = {"/".join(n.split("/")[:GROUP_DEPTH]) for n, good in finite.items() if not good}
    ids, size = batch["image_id"], len(batch["image_id"])

    def broken(rows: np.ndarray) -> bool:
        # Of the same shape, so that nothing is compiled again.
        filled = np.resize(rows, size)
        values, _ = probe(state, {name: value[filled] for name, value in batch.items()})
        return not _is_finite(values)

    found = [] if _is_finite(metrics) else culprits(np.arange(size), broken)
    odd = np.zeros(size, bool)
    for value in batch.values():
        if np.issubdtype(value.dtype, np.floating):
            odd |= ~np.isfinite(value).reshape(size, -1).all(axis=1)
    return Replayed(metrics, sorted(groups), ids.tolist(), ids[odd].tolist(), ids[found].tolist())


def culprits(rows: np.ndarray, broken: Callable[[np.ndarray], bool]) -> list[int]:
    """The rows that are broken by themselves, found by halving what is broken."""
    if not broken(rows):
        return []
    if len(rows) == 1:
        return [int(rows[0])]
    half = len(rows) // 2
    return culprits(rows[:half], broken) + culprits(rows[half:], broken)


def _is_finite(metrics: Mapping[str, float]) -> bool:
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def _report(step: int, start: int, replayed: Replayed) -> str:
    def listed(values: Sequence[Any]) -> str:
        return ", ".join(map(str, values)) or "none"

    between = step - 1 - start
    again = f", {between} steps trained again" if between else ""
    terms = [f"  {name} {value:.6g}" for name, value in replayed.metrics.items()]
    return "\n".join(
        [
            f"step {step}, from the state of step {start}{again}:",
            *terms,
            f"gradients that are not finite: {listed(replayed.groups)}",
            f"image_id of the records: {listed(replayed.ids)}",
            f"... with inputs that are not finite: {listed(replayed.inputs)}",
            f"... that break a batch of themselves alone: {listed(replayed.culprits)}",
        ]
    )


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_replay(replay)
