"""Training: ``python -m mplug_jax.train --config=configs/quickstart.py --workdir=runs/quickstart``.

The one loop of the project. Its order never changes: restore; then, at each step, evaluate if
due, save if due, next batch, step, log. The same command again continues a run.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from mplug_jax.config import run_main, save_config, validate
from mplug_jax.data.pipeline import BadBudget, train_iterator
from mplug_jax.models.mplug import MPlug, count_params
from mplug_jax.tasks import build_task
from mplug_jax.training.checkpoint import Checkpointer, load_params
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.metrics import MetricsWriter, Progress, Throughput, write_results
from mplug_jax.training.optimizer import make_optimizer
from mplug_jax.training.reports import plot_losses
from mplug_jax.training.sharding import (
    batch_sharding,
    check_batch,
    make_mesh,
    place_local_batch,
    replicated,
    state_shardings,
)
from mplug_jax.training.state import TrainState, create_state, params_sha256
from mplug_jax.training.step import make_train_step


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is no longer a number."""


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains to ``config.total_steps`` and returns the last metrics of the evaluators.

    Raises:
      ConfigError, MeshError, SourceError, CheckpointError: a mistake in the config or the data.
      NonFiniteError: a loss term or the gradient is NaN or infinite.
    """
    validate(config)
    first = jax.process_index() == 0
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, config.accumulate)
    task = build_task(config, workdir)
    if first:
        save_config(config, workdir)

    # Shapes first, then placement, then values: nothing is ever built on one device and moved.
    boxed = jax.eval_shape(task.init_params, jax.random.key(config.seed))
    optimizer = make_optimizer(nn.meta.unbox(boxed), config.optimizer, config.total_steps)
    init = functools.partial(_initial_state, task, optimizer, config.seed)
    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, boxed, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    iterator = train_iterator(
        task.sources,
        task.make_example,
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        threads=config.data.threads,
    )
    checkpointer = Checkpointer(workdir, config.checkpoint)
    start = checkpointer.latest_step()
    if start is not None:
        state = checkpointer.restore(start, abstract, iterator)
        source = f"checkpoint of step {start} in {workdir}"
    else:
        state = jax.jit(init, out_shardings=shardings)()
        source = f"random, seed {config.seed}"
        if config.init_from:
            params, path = load_params(config.init_from, abstract.params)
            state = _start_from(state, params)
            source = f"parameters of {path}"
    start = start or 0
    _print_parameters(abstract.params, source, first)

    example = iterator.first_example()
    step_fn, flops = _compile(config, task, optimizer, abstract, shardings, mesh, example, first)
    evaluators = task.evaluators(mesh)
    writer = MetricsWriter(workdir, start, enabled=first)
    progress = Progress(config.total_steps, start, enabled=first)
    throughput = Throughput(config.batch_size, flops)
    budget = BadBudget(config.data.max_bad_fraction)
    results: dict[str, float] = {}
    pending: tuple[int, dict[str, jax.Array]] | None = None

    for step in range(start, config.total_steps + 1):
        last = step == config.total_steps
        if _due(step, config.eval_every, start) or last:
            with throughput.excluded():
                samples = folder / "samples" if first else None
                results = _evaluate(evaluators, state.params, samples if last else None)
                writer.write(step, results)
                for name, value in results.items():
                    progress.note(f"step {step}  {name} {value:.4g}")
        if _due(step, config.checkpoint_every, start) or (last and step > start):
            with throughput.excluded():
                _check_finite(pending)
                checkpointer.save(step, state, iterator, results)
        if last:
            break
        batch = next(iterator)
        budget.update(batch)
        state, metrics = step_fn(state, place_local_batch(batch, mesh))
        # The step before this one has finished by now, so looking at it stalls nothing.
        _check_finite(pending)
        pending = step + 1, metrics
        throughput.count()
        progress.update(step + 1)
        if _due(step + 1, config.log_every, start) or step + 1 == config.total_steps:
            _check_finite(pending)
            scalars = {f"train/{name}": float(value) for name, value in metrics.items()}
            scalars |= throughput.report()
            writer.write(step + 1, scalars)
            progress.report(step + 1, scalars)

    checkpointer.close()
    iterator.close()
    writer.close()
    progress.close()
    digest = params_sha256(state.params)
    if first:
        write_results(workdir, config.total_steps, digest, results)
        plot_losses(workdir)
        print(f"results: {folder / 'results.json'}  plots: {folder / 'plots'}", flush=True)
    return results


def _initial_state(task: Any, optimizer: Any, seed: int) -> TrainState:
    rng = jax.random.key(seed)
    return create_state(
        task.init_params(rng),
        optimizer,
        task.init_extra(jax.random.fold_in(rng, 1)),
        seed,
        task.uses_momentum,
    )


def _start_from(state: TrainState, params: Any) -> TrainState:
    """A fresh state with given parameters, which the teacher starts from as well."""
    teacher = state.momentum_params
    copied = None if teacher is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, momentum_params=copied)


def _due(step: int, every: int, start: int) -> bool:
    return every > 0 and step > start and step % every == 0


def _compile(
    config: ConfigDict,
    task: Any,
    optimizer: Any,
    abstract: TrainState,
    shardings: Any,
    mesh: Any,
    example: Any,
    first: bool,
) -> tuple[Any, int]:
    """The compiled step and its model FLOPs; prints both, with the step's memory."""
    build = functools.partial(
        make_train_step,
        optimizer=optimizer,
        optimizer_config=config.optimizer.to_dict(),
        total_steps=config.total_steps,
        accumulate=config.accumulate,
        momentum=config.objectives.momentum,
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *value.shape), value.dtype, sharding=batch_sharding(mesh)
        )
        for name, value in example.items()
    }
    with jax.set_mesh(mesh):
        # Model FLOPs do not count what rematerialisation repeats.
        model, task.model = task.model, MPlug(task.model_config.replace(remat="none"))
        flops = matmul_flops(build(task.loss), abstract, batch)
        task.model = model
        began = time.perf_counter()
        compiled = (
            jax.jit(
                build(task.loss),
                donate_argnums=0,
                in_shardings=(shardings, batch_sharding(mesh)),
                out_shardings=(shardings, replicated(mesh)),
            )
            .lower(abstract, batch)
            .compile()
        )
    memory = compiled.memory_analysis()
    if first:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        print(
            f"step: {flops / 1e9:.2f} model GFLOPs, compiled in {time.perf_counter() - began:.1f} s; "
            f"per device {total / 2**20:.0f} MiB (state and batch "
            f"{memory.argument_size_in_bytes / 2**20:.0f}, temporaries "
            f"{memory.temp_size_in_bytes / 2**20:.0f}) on {mesh.size} x "
            f"{jax.devices()[0].device_kind}",
            flush=True,
        )
    return compiled, flops


def _evaluate(evaluators: dict[str, Any], params: Any, samples: Path | None) -> dict[str, float]:
    return {
        f"{name}/{metric}": value
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(params, samples).items()
    }


def _check_finite(pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Raises NonFiniteError naming the step and the terms that are not finite."""
    if pending is None:
        return
    step, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    broken = ", ".join(f"{n}={v}" for n, v in values.items() if not math.isfinite(v))
    raise NonFiniteError(
        f"step {step}: {broken}. Nothing was saved after it; the last checkpoint is intact. Lower "
        "config.optimizer.lr, lengthen warmup_steps, or clip more tightly with clip_norm."
    )


def _print_parameters(params: Any, source: str, first: bool) -> None:
    if not first:
        return
    counts = {name: count_params(value) for name, value in params.items()}
    for name, count in counts.items():
        print(f"  {name:<16} {count / 1e6:>9.3f} M")
    print(f"parameters: {sum(counts.values()) / 1e6:.3f} M; init: {source}", flush=True)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_main(train)
