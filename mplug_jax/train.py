"""Training: ``python -m mplug_jax.train --config=configs/quickstart.py --workdir=runs/quickstart``.

The one loop of the project. Its order never changes: restore; then, at each step, evaluate if
due, save if due, next batch, step, log. The same command again continues a run.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.command_line import run_main
from mplug_jax.config import ConfigError, config_errors
from mplug_jax.data.pipeline import BadBudget, TrainIterator, train_iterator
from mplug_jax.tasks import build_task
from mplug_jax.training.checkpoint import Checkpointer, load_params
from mplug_jax.training.finite import FiniteCheck
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.metrics import MetricsWriter, Progress, Throughput, write_results
from mplug_jax.training.optimizer import make_optimizer
from mplug_jax.training.reports import plot_losses
from mplug_jax.training.sharding import (
    abstract_batch,
    batch_sharding,
    check_batch,
    make_mesh,
    place_local_batch,
    replicated,
    state_shardings,
)
from mplug_jax.training.state import TrainState, create_state, params_sha256
from mplug_jax.training.step import first_momentum_params, make_train_step
from mplug_jax.training.summary import describe_parameters, describe_step
from mplug_jax.training.workdir import check_config, locked, record_start
from mplug_jax.validation import validate


class Program(NamedTuple):
    """The shapes and placement of the state, and what updates it."""

    abstract: TrainState
    optimizer: Any
    init: Callable[[], TrainState]


def train(
    config: ConfigDict, workdir: str, *, allow_config_change: bool = False
) -> dict[str, float]:
    """Trains to ``config.total_steps`` and returns the last metrics of the evaluators.

    Raises:
      ConfigError, MeshError, SourceError, CheckpointError: a mistake in the config or the data.
      WorkdirError: another run is in the workdir, or it has another config and no change of it
        was allowed.
      CheckpointError: also, if the last checkpoint could not be saved.
      NonFiniteError: the loss or the gradient is NaN or infinite, too often in a row.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, config.accumulate)
    first = jax.process_index() == 0
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(locked(workdir))
        changed = check_config(config, workdir, allow_change=allow_config_change)
        with config_errors():
            task = build_task(config, workdir)
            evaluators, rollout = task.evaluators(mesh), task.rollout(mesh)
        program = _program(config, task, mesh)
        iterator = stack.enter_context(contextlib.closing(_iterator(config, task)))
        checkpointer = stack.enter_context(
            contextlib.closing(Checkpointer(workdir, config.checkpoint))
        )
        with ThreadPoolExecutor(1) as background:
            # The step compiles while the state is made, which compiles a program of its own.
            example = iterator.first_example()
            example = example if rollout is None else rollout.shapes(example)
            compiling = background.submit(_compile, config, task, mesh, program, example)
            state, start = _state(config, task, program, checkpointer, iterator)
            step_fn, flops = compiling.result()
        if first:
            record_start(config, workdir, start, changed)
        writer = stack.enter_context(
            contextlib.closing(MetricsWriter(workdir, start, enabled=first))
        )
        progress = stack.enter_context(
            contextlib.closing(Progress(config.total_steps, start, enabled=first))
        )
        throughput = Throughput(config.batch_size, flops)
        budget = BadBudget(config.data.max_bad_fraction)
        results: dict[str, float] = {}
        finite = FiniteCheck(config.max_skipped)

        for step in range(start, config.total_steps + 1):
            last = step == config.total_steps
            evaluated: dict[str, float] = {}
            if last or _due(step, config.eval_every, start):
                with throughput.excluded():
                    finite.settle()
                    samples = folder / "samples" if last and first else None
                    results = evaluated = _evaluate(evaluators, state, samples)
                    writer.write(step, results)
                    progress.note("\n".join(f"step {step}  {n} {results[n]:.4g}" for n in results))
            if (last and step > start) or _due(step, config.checkpoint_every, start):
                with throughput.excluded():
                    finite.settle()
                    checkpointer.save(step, state, iterator, evaluated)
            if last:
                # No later save could make up for this one: that it failed ends the run.
                checkpointer.wait()
                break
            batch = next(iterator)
            budget.update(batch)
            if rollout is not None:
                batch = rollout(state.params, batch, step)
            ids = batch["image_id"]
            state, metrics = step_fn(state, place_local_batch(batch, mesh))
            # The step before this one has finished by now, so looking at it stalls nothing.
            finite.follow(step + 1, metrics, ids)
            throughput.count()
            progress.update(step + 1)
            if step + 1 == config.total_steps or _due(step + 1, config.log_every, start):
                finite.settle()
                scalars = {f"train/{name}": float(value) for name, value in metrics.items()}
                counts = {"train/bad_records": budget.bad, "train/skipped": finite.skipped}
                scalars |= counts | throughput.report()
                writer.write(step + 1, scalars)
                progress.report(step + 1, scalars)

    if first:
        write_results(workdir, config.total_steps, params_sha256(state.params), results)
        plot_losses(workdir)
        print(f"results in {folder}: results.json, plots/, samples/", flush=True)
    return results


def _iterator(config: ConfigDict, task: Any) -> TrainIterator:
    return train_iterator(
        task.sources,
        task.make_example,
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        threads=config.data.threads,
    )


def _program(config: ConfigDict, task: Any, mesh: Mesh) -> Program:
    boxed = jax.eval_shape(task.init_params, jax.random.key(config.seed))
    optimizer = make_optimizer(nn.meta.unbox(boxed), config.optimizer, config.total_steps)

    def init() -> TrainState:
        rng = jax.random.key(config.seed)
        extra = task.init_extra(jax.random.fold_in(rng, 1))
        params = nn.meta.unbox(task.init_params(rng))
        teacher = _first_teacher(config, task, params)
        return create_state(params, optimizer, extra, config.seed, teacher)

    abstract = jax.eval_shape(init)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        state_shardings(abstract, boxed, mesh),
    )
    return Program(abstract, optimizer, init)


def _first_teacher(config: ConfigDict, task: Any, params: Any) -> Any:
    return first_momentum_params(params, config.optimizer) if task.uses_momentum else None


def _state(
    config: ConfigDict,
    task: Any,
    program: Program,
    checkpointer: Checkpointer,
    iterator: TrainIterator,
) -> tuple[TrainState, int]:
    """The state to begin with, built where it will lie, and its step: restored, loaded or fresh."""
    step = checkpointer.latest_step()
    if step is not None:
        if step > config.total_steps:
            raise ConfigError(
                f"config.total_steps={config.total_steps}, but {checkpointer.folder} has reached "
                f"step {step} already: give more steps or another --workdir."
            )
        state = checkpointer.restore(step, program.abstract, iterator)
        source = f"checkpoint of step {step}"
    else:
        shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
        state = jax.jit(program.init, out_shardings=shardings)()
        source = f"random, seed {config.seed}"
        if config.init_from:
            params, path, done = load_params(
                config.init_from,
                state.params,
                task.model_config.vision.grid,
                task.optional_parameters,
            )
            teacher = _first_teacher(config, task, params)
            state = state.replace(params=params, momentum_params=teacher)
            source = f"parameters of {path}" + (f" ({done.describe()})" if done.describe() else "")
    if jax.process_index() == 0:
        print(describe_parameters(program.abstract.params, source), flush=True)
    return state, step or 0


def _compile(
    config: ConfigDict, task: Any, mesh: Mesh, program: Program, example: Mapping[str, Any]
) -> tuple[Any, int]:
    """The compiled step and its model FLOPs."""
    build = functools.partial(
        make_train_step,
        optimizer=program.optimizer,
        optimizer_config=config.optimizer.to_dict(),
        total_steps=config.total_steps,
        accumulate=config.accumulate,
        momentum=config.objectives.momentum,
        momentum_warmup=config.objectives.momentum_warmup,
        teacher_frozen=config.objectives.teacher_frozen,
        skip_non_finite=config.max_skipped > 0,
    )
    batch = abstract_batch(example, config.batch_size, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
    step = jax.jit(
        build(task.loss),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        # Model FLOPs do not count what rematerialisation repeats.
        flops = matmul_flops(build(task.without_remat().loss), program.abstract, batch)
        began = time.perf_counter()
        compiled = step.lower(program.abstract, batch).compile()
    if jax.process_index() == 0:
        print(describe_step(compiled, flops, time.perf_counter() - began, mesh), flush=True)
    return compiled, flops


def _evaluate(
    evaluators: dict[str, Any], state: TrainState, samples: Path | None
) -> dict[str, float]:
    return {
        f"{name}/{metric}": value
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(state.params, samples).items()
    }


def _due(step: int, every: int, start: int) -> bool:
    return every > 0 and step > start and step % every == 0


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_main(train)
