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
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.command_line import run_main
from mplug_jax.config import ConfigError, config_errors
from mplug_jax.data.pipeline import BadBudget, TrainIterator, train_iterator
from mplug_jax.tasks import build_task
from mplug_jax.training.checkpoint import Checkpointer, WholeCheckpoints, load_params
from mplug_jax.training.finite import FiniteCheck
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.metrics import MetricsWriter, Progress, Throughput, write_results
from mplug_jax.training.optimizer import make_optimizer
from mplug_jax.training.peers import reached
from mplug_jax.training.reports import plot_losses
from mplug_jax.training.sharding import (
    abstract_batch,
    batch_sharding,
    check_batch,
    make_mesh,
    offloaded,
    on_mesh,
    place_local_batch,
    replicated,
    state_shardings,
)
from mplug_jax.training.signals import Abandoned, Stop
from mplug_jax.training.spikes import SpikeCheck
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


class Run(NamedTuple):
    """What the loop works with."""

    config: ConfigDict
    mesh: Mesh
    folder: Path
    evaluators: Mapping[str, Any]
    rollout: Any
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Any]]
    iterator: TrainIterator
    new_iterator: Callable[[], TrainIterator]
    checkpointer: Checkpointer
    writer: MetricsWriter
    progress: Progress
    throughput: Throughput
    spikes: SpikeCheck
    finite: FiniteCheck
    stop: Stop


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
      Stopped: SIGTERM or SIGINT came, and what was trained is saved.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, config.accumulate)
    first = jax.process_index() == 0
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if first:
            stack.enter_context(locked(workdir))
        changed = check_config(config, workdir, allow_change=allow_config_change)
        with config_errors():
            task = build_task(config, workdir)
            evaluators, rollout = task.evaluators(mesh), task.rollout(mesh)
        program = make_program(config, task, mesh)
        iterator = _open(stack, training_iterator(config, task))
        checkpointer = _open(stack, Checkpointer(workdir, config.checkpoint))
        with ThreadPoolExecutor(1) as background:
            # The step compiles while the state is made, which compiles a program of its own.
            example = iterator.first_example()
            example = example if rollout is None else rollout.shapes(example)
            compiling = background.submit(_compile, config, task, mesh, program, example)
            reached("the making or restoring of the state")
            state, start = first_state(config, task, program, checkpointer, iterator)
            reached("the compilation of the step")
            step_fn, flops = compiling.result()
        reached("the first step")
        if first:
            record_start(config, workdir, start, changed)
        spikes = SpikeCheck(config.spike_factor)
        run = Run(
            *(config, mesh, folder, evaluators, rollout, step_fn, iterator),
            new_iterator=functools.partial(training_iterator, config, task),
            checkpointer=checkpointer,
            writer=_open(stack, MetricsWriter(workdir, start, enabled=first)),
            progress=_open(stack, Progress(config.total_steps, start, enabled=first)),
            throughput=Throughput(config.batch_size, flops),
            spikes=spikes,
            finite=FiniteCheck(config.max_skipped, workdir, spikes.see),
            stop=stop,
        )
        state, results = _loop(run, state, start)
    _report(folder, config.total_steps, state, results)
    return results


def _report(folder: Path, steps: int, state: TrainState, results: Mapping[str, float]) -> None:
    """Writes results.json and the plots."""
    reached("the gathering of the parameters")
    # All processes gather the parameters of which each may hold a part.
    digest = params_sha256(state.params)
    if jax.process_index() == 0:
        write_results(folder, steps, digest, results)
        plot_losses(folder)
        print(f"results in {folder}: results.json, plots/, samples/", flush=True)


def _open(stack: contextlib.ExitStack, thing: Any) -> Any:
    """``thing``, which ``stack`` will close."""
    return stack.enter_context(contextlib.closing(thing))


def _loop(run: Run, state: TrainState, start: int) -> tuple[TrainState, dict[str, float]]:
    """The state after the last step, and the last metrics of the evaluators."""
    config = run.config
    budget = BadBudget(config.data.max_bad_fraction)
    results: dict[str, float] = {}
    owed = _evaluation_owed(run, start)
    run.stop.begin()
    for step in range(start, config.total_steps + 1):
        last = step == config.total_steps
        evaluated: dict[str, float] = {}
        position = run.iterator.get_state()
        try:
            run.stop.check()
            if last or _due(step, config.eval_every, start) or (owed and step == start):
                reached(f"the evaluation at step {step}")
                results = evaluated = _evaluate(run, step, state, last)
            if (last and step > start) or _due(step, config.checkpoint_every, start):
                reached(f"the checkpoint of step {step}")
                with run.throughput.excluded():
                    run.finite.settle()
                    run.checkpointer.save(step, state, run.iterator, evaluated)
            if last:
                # No later save could make up for this one: that it failed ends the run.
                run.checkpointer.wait()
                break
            reached(f"the batch of step {step + 1}")
            batch = run.stop.wait_for(functools.partial(next, run.iterator))
            budget.update(batch)
            if run.rollout is not None:
                batch = run.rollout(state.params, batch, step)
        except Abandoned:
            _end(run, step, state, position)
        reached(f"step {step + 1}")
        ids = batch["image_id"]
        state, metrics = run.step_fn(state, place_local_batch(batch, run.mesh))
        # The step before this one has finished by now, so looking at it stalls nothing.
        run.finite.follow(step + 1, metrics, ids)
        run.throughput.count()
        run.progress.update(step + 1)
        if step + 1 == config.total_steps or _due(step + 1, config.log_every, start):
            run.finite.settle()
            scalars = {f"train/{name}": float(value) for name, value in metrics.items()}
            counts = {"bad_records": budget.bad, "skipped": run.finite.skipped}
            counts["spikes"] = run.spikes.spikes
            scalars |= {f"train/{name}": count for name, count in counts.items()}
            scalars |= run.throughput.report()
            run.writer.write(step + 1, scalars)
            run.progress.report(step + 1, scalars)
    return state, results


def _end(run: Run, step: int, state: TrainState, position: Mapping[str, Any]) -> NoReturn:
    """Saves the state at ``step`` and the iterator at ``position``, and ends the run as asked."""
    run.finite.settle()
    saved = False
    if step > 0:
        # The run's own iterator may be about to move, in the thread that waits for a batch.
        iterator = run.new_iterator()
        iterator.set_state(dict(position))
        saved = run.checkpointer.complete(step, state, iterator)
    run.stop.end(step, saved)


def training_iterator(config: ConfigDict, task: Any) -> TrainIterator:
    """The batches of this process, from the first on."""
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


def make_program(config: ConfigDict, task: Any, mesh: Mesh) -> Program:
    """Shapes, placement, optimizer and start of the state of a config."""
    boxed = jax.eval_shape(task.init_params, jax.random.key(config.seed))
    optimizer = make_optimizer(nn.meta.unbox(boxed), config.optimizer, config.total_steps)

    def init() -> TrainState:
        rng = jax.random.key(config.seed)
        extra = task.init_extra(jax.random.fold_in(rng, 1))
        params = nn.meta.unbox(task.init_params(rng))
        teacher = _first_teacher(config, task, params)
        return create_state(params, optimizer, extra, config.seed, teacher)

    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, boxed, mesh)
    if config.optimizer.offload:
        shardings = offloaded(shardings)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return Program(abstract, optimizer, init)


def _first_teacher(config: ConfigDict, task: Any, params: Any) -> Any:
    return first_momentum_params(params, config.optimizer) if task.uses_momentum else None


def first_state(
    config: ConfigDict,
    task: Any,
    program: Program,
    checkpointer: Checkpointer | WholeCheckpoints,
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


def gradient_settings(config: ConfigDict) -> dict[str, Any]:
    """What ``make_gradients`` takes of a config."""
    return {
        "optimizer_config": config.optimizer.to_dict(),
        "accumulate": config.accumulate,
        "momentum": config.objectives.momentum,
        "momentum_warmup": config.objectives.momentum_warmup,
        "teacher_frozen": config.objectives.teacher_frozen,
    }


def make_update(config: ConfigDict, program: Program, loss: Any) -> Callable[..., Any]:
    """(state, batch) -> (state, metrics) with a loss of the task's kind."""
    return make_train_step(
        loss,
        program.optimizer,
        total_steps=config.total_steps,
        skip_non_finite=config.max_skipped > 0,
        offload=config.optimizer.offload,
        **gradient_settings(config),
    )


def jitted_step(config: ConfigDict, task: Any, mesh: Mesh, program: Program) -> Any:
    """(state, batch) -> (state, metrics), not compiled yet; the state is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
    return jax.jit(
        make_update(config, program, task.loss),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def _compile(
    config: ConfigDict, task: Any, mesh: Mesh, program: Program, example: Mapping[str, Any]
) -> tuple[Any, int]:
    """The compiled step and its model FLOPs."""
    batch = abstract_batch(example, config.batch_size, mesh)
    without_remat = make_update(config, program, task.without_remat().loss)
    step = jitted_step(config, task, mesh, program)
    with on_mesh(mesh):
        # Model FLOPs do not count what rematerialisation repeats.
        flops = matmul_flops(without_remat, program.abstract, batch)
        began = time.perf_counter()
        compiled = step.lower(program.abstract, batch).compile()
    if jax.process_index() == 0:
        print(describe_step(compiled, flops, time.perf_counter() - began, mesh), flush=True)
    return compiled, flops


def _evaluate(run: Run, step: int, state: TrainState, last: bool) -> dict[str, float]:
    """Runs the evaluators and records their metrics; with pictures at the end."""
    with run.throughput.excluded():
        run.finite.settle()
        samples = run.folder / "samples" if last and jax.process_index() == 0 else None
        results = {
            f"{name}/{metric}": value
            for name, evaluator in run.evaluators.items()
            for metric, value in evaluator(state.params, samples).items()
        }
        run.writer.write(step, results)
        run.progress.note("\n".join(f"step {step}  {n} {results[n]:.4g}" for n in results))
    return results


def _evaluation_owed(run: Run, start: int) -> bool:
    """Whether an evaluation was due where the run continues, and given up as it was to end."""
    due = start > 0 and run.config.eval_every > 0 and start % run.config.eval_every == 0
    owed = due and bool(run.evaluators) and not run.writer.recorded(start, run.evaluators)
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(owed)))


def _due(step: int, every: int, start: int) -> bool:
    return every > 0 and step > start and step % every == 0


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_main(train)
