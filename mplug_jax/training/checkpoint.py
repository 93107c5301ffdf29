"""Orbax checkpoints: the train state and the data iterator, saved together and asynchronously."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mplug_jax.training.state import TrainState, path_name


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit the model."""


class Checkpointer:
    """Saves and restores (state, iterator) under ``workdir/checkpoints/<step>``.

    Keeps the newest ``keep_last`` checkpoints and the best by ``best_metric``.
    """

    def __init__(self, workdir: str | Path, config: Mapping[str, Any]):
        policies: list[Any] = [LatestN(config["keep_last"])]
        metric = config["best_metric"]
        # A run continued with another best_metric finds checkpoints without it.
        worst = -math.inf if config["best_mode"] == "max" else math.inf

        def rank(metrics: Mapping[str, float]) -> float:
            return metrics.get(metric, worst)

        if metric:
            policies.append(
                BestN(
                    get_metric_fn=rank,
                    reverse=config["best_mode"] == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._metric = metric
        self.folder = (Path(workdir) / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                # The policy decides; without this, Orbax would not write the metrics to disk, and
                # a continued run would delete its best checkpoint.
                best_fn=rank if metric else None,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, iterator: Any, metrics: Mapping[str, float]
    ) -> None:
        """Starts saving; returns once the arrays are copied off the device.

        Args:
          metrics: of this very step, or empty where nothing was evaluated.

        Raises:
          CheckpointError: ``best_metric`` is none of the metrics.
        """
        if self._metric and metrics and self._metric not in metrics:
            raise CheckpointError(
                f"config.checkpoint.best_metric={self._metric!r} is none of the metrics: "
                f"{', '.join(sorted(metrics))}."
            )
        best = {self._metric: metrics[self._metric]} if self._metric in metrics else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
            metrics=best,
        )

    def restore(self, step: int, abstract_state: Any, iterator: Any) -> TrainState:
        """Restores the state in the given shardings and moves ``iterator`` to its position."""
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._manager.directory} does not fit this "
                f"config ({_first_line(error)}). Use the config it was made with, or another "
                "--workdir and --config.init_from to start from its parameters."
            ) from error
        return restored["state"]

    def wait(self) -> None:
        """Blocks until the save under way is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way and lets go of the directory."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)


def find_checkpoint(path: str | Path) -> Path:
    """The ``.../checkpoints/<step>`` folder meant by a workdir, its checkpoints, or one of them.

    Raises:
      CheckpointError: nothing there.
    """
    path = Path(path).absolute()
    for root in (path / "checkpoints", path):
        steps = [int(p.name) for p in root.glob("*") if p.name.isdigit()] if root.is_dir() else []
        if steps:
            return root / str(max(steps))
    if (path / "state").is_dir():
        return path
    raise CheckpointError(
        f"config.init_from={path}: no checkpoint there. Give a workdir of a run, its checkpoints "
        "folder, or one step's folder."
    )


def load_params(path: str | Path, abstract_params: Any) -> tuple[Any, Path]:
    """Parameters of another run, checked name by name against this model.

    Args:
      abstract_params: tree of ShapeDtypeStruct with shardings.

    Returns:
      (params, the folder they came from).

    Raises:
      CheckpointError: with the full symmetric difference of names and the shapes that differ.
    """
    folder = find_checkpoint(path)
    checkpointer = ocp.StandardCheckpointer()
    try:
        metadata = checkpointer.metadata(folder / "state").item_metadata.tree["params"]
    except (FileNotFoundError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable parameters ({_first_line(error)})."
        ) from error
    saved = {path_name(p): tuple(m.shape) for p, m in _leaves(metadata)}
    wanted = {path_name(p): tuple(x.shape) for p, x in _leaves(abstract_params)}
    problems = [f"  only in the checkpoint: {name}" for name in sorted(set(saved) - set(wanted))]
    problems += [f"  only in the model: {name}" for name in sorted(set(wanted) - set(saved))]
    problems += [
        f"  {name}: {saved[name]} in the checkpoint, {wanted[name]} in the model"
        for name in sorted(set(saved) & set(wanted))
        if saved[name] != wanted[name]
    ]
    if problems:
        raise CheckpointError(
            f"The parameters of {folder} are not those of config.model:\n" + "\n".join(problems)
        )
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": abstract_params},
                restore_args=ocp.checkpoint_utils.construct_restore_args(
                    {"params": abstract_params}
                ),
                partial_restore=True,
            ),
        )
    return restored["params"], folder


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def saved_config(path: str | Path) -> dict[str, Any] | None:
    """The config.json of the run a checkpoint belongs to, or None."""
    folder = find_checkpoint(path)
    for parent in (folder.parent.parent, folder.parent, folder):
        file = parent / "config.json"
        if file.is_file():
            return json.loads(file.read_text())
    return None
