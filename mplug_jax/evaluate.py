"""The figures of a checkpoint: ``python -m mplug_jax.evaluate --config=FILE --checkpoint=RUN``.

FILE is a config file or the config.json of a run; RUN is a workdir, one of its checkpoints, or a
folder that ``mplug_jax.convert`` wrote. The evaluators of the config run once; of data, only theirs
is read. ``--workdir`` gets results.json, samples/ and config.json; without it that is
``RUN/evaluation/<config>-<step>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from mplug_jax.command_line import run_evaluation
from mplug_jax.config import ConfigError, config_errors, save_config
from mplug_jax.tasks import build_task
from mplug_jax.tasks.restored import (
    checkpoint_step,
    for_use,
    lacks_classifier,
    restore,
    run_folder,
)
from mplug_jax.training.checkpoint import CheckpointError, find_checkpoint
from mplug_jax.training.initialise import Plan
from mplug_jax.training.metrics import write_results
from mplug_jax.training.sharding import make_mesh
from mplug_jax.training.state import params_sha256
from mplug_jax.validation import validate


def evaluate(config: ConfigDict, checkpoint: str, workdir: str) -> dict[str, float]:
    """Runs ``config.evals`` on a checkpoint's parameters, and writes the results into ``workdir``.

    Returns:
      the metrics, named ``<evaluator>/<metric>``.

    Raises:
      ConfigError, MeshError, SourceError: a mistake in the config or the held-out data.
      CheckpointError: no checkpoint, or parameters that do not fit or lack what is evaluated.
    """
    validate(config)
    if not config.evals:
        raise ConfigError("config.evals names no evaluator: there is nothing to evaluate.")
    folder = find_checkpoint(checkpoint, "--checkpoint")
    mesh = make_mesh(config.mesh)
    with config_errors():
        task = build_task(for_use(config, folder), workdir)
        evaluators = task.evaluators(mesh)
    params, step, plan = restore(folder, task.model_config, mesh)
    _check_heads(config, folder, plan)
    first = jax.process_index() == 0
    if first:
        print(f"parameters of {folder}" + (f" ({_account(plan)})" if _account(plan) else ""))
    samples = Path(workdir) / "samples" if first else None
    results = {
        f"{name}/{metric}": value
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(params, samples).items()
    }
    digest = params_sha256(params)
    if first:
        save_config(config, workdir)
        write_results(workdir, step, digest, results)
        print(table(results, dict(config.published)))
        print(f"results in {workdir}: results.json, samples/", flush=True)
    return results


def default_workdir(checkpoint: str, name: str) -> Path:
    """``evaluation/<name of the config>-<step>`` in the workdir of the checkpoint's run.

    Raises:
      CheckpointError: no checkpoint there.
    """
    folder = find_checkpoint(checkpoint, "--checkpoint")
    return run_folder(folder) / "evaluation" / f"{name}-{checkpoint_step(folder)}"


def table(results: Mapping[str, float], published: Mapping[str, float]) -> str:
    """A line a metric, the evaluator named once, and beside it the figure of the paper for it.

    What the paper has and the results have not, such as what only a test server knows, is shown
    as missing.
    """
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys([*results, *published]):
        rows.setdefault(name.partition("/")[0], []).append(name)
    width = max((len(name.partition("/")[2]) for name in (*results, *published)), default=0)
    lines = []
    for evaluator, names in rows.items():
        lines.append(evaluator)
        for name in names:
            own = f"{results[name]:>9.4g}" if name in results else f"{'-':>9}"
            beside = f"  published {published[name]:g}" if name in published else ""
            lines.append(f"  {name.partition('/')[2]:<{width}}  {own}{beside}")
    return "\n".join(lines)


def _check_heads(config: ConfigDict, folder: Path, plan: Plan) -> None:
    """Raises CheckpointError if an evaluator reads parameters that the checkpoint has not."""
    if not lacks_classifier(plan):
        return
    reading = [n for n, settings in config.evals.items() if settings.kind == "classification"]
    if reading:
        raise CheckpointError(
            f"{folder} has no classifier for config.evals.{reading[0]} to judge "
            f"({', '.join(plan.fresh)}): evaluate a run of config.task='nlvr2' or 'snli_ve'."
        )


def _account(plan: Plan) -> str:
    """What was done to parameters that were not simply taken."""
    missing = f"not in the checkpoint, and read by no evaluator: {', '.join(plan.fresh)}"
    rest = plan._replace(fresh=[]).describe()
    return "; ".join(filter(None, (rest, missing if plan.fresh else "")))


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_evaluation(evaluate, default_workdir)
