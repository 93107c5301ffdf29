"""Orbax checkpoints: the train state and the data iterator, saved together and asynchronously."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mplug_jax.training.initialise import Plan, grown, plan, resized, square_grid
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
        # Not every checkpoint was evaluated, or had this metric when it was.
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
        # Never None, at which Orbax warns; without the metric a checkpoint ranks as the worst.
        best = {self._metric: metrics[self._metric]} if self._metric in metrics else {}
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


def find_checkpoint(path: str | Path, given_as: str = "config.init_from") -> Path:
    """The ``.../checkpoints/<step>`` folder meant by a workdir, its checkpoints, or one of them.

    Args:
      given_as: the setting or argument that the user gave the path as, for the message.

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
        f"{given_as}={path}: no checkpoint there. Give a workdir of a run, its checkpoints folder, "
        "or one step's folder."
    )


def load_params(
    path: str | Path,
    params: Any,
    grid: tuple[int, int],
    optional: Sequence[str] = (),
    part: str = "",
) -> tuple[Any, Path, Plan]:
    """Parameters of another run, fitted to this model; see ``training/initialise.py``.

    Args:
      params: this model's tree, freshly initialised: what the checkpoint does not give stays.
        Leaves may be abstract where nothing of them stays.
      grid: rows and columns of this model's patches.
      optional: patterns of parameters that either side may lack.
      part: the top-level part that ``params`` is limited to ('visual_encoder'), or all of it.

    Returns:
      (params in the shardings of ``params``, the folder they came from, what was done).

    Raises:
      CheckpointError: with the full symmetric difference of names and the shapes that differ.
    """
    folder = find_checkpoint(path)
    wanted = {path_name(p): x for p, x in _leaves(params)}
    saved = {n: s for n, s in _saved_shapes(folder).items() if n.split("/")[0] == part or not part}
    todo = plan(saved, {name: tuple(x.shape) for name, x in wanted.items()}, optional)
    if todo.problems:
        raise CheckpointError(
            f"The parameters of {folder} are not those of config.model:\n"
            + "\n".join(todo.problems)
        )
    taken = {n: wanted[n] for n in todo.same}
    for name in (*todo.resized, *todo.grown):
        taken[name] = jax.ShapeDtypeStruct(saved[name], wanted[name].dtype)
    arrays = _restore(folder, taken)
    for name in todo.resized:
        arrays[name] = resized(arrays[name], _saved_grid(folder, saved[name]), grid)
    for name in todo.grown:
        arrays[name] = grown(arrays[name], wanted[name])
    for name in (*todo.resized, *todo.grown):
        arrays[name] = jax.device_put(arrays[name], wanted[name].sharding)
    tree = jax.tree_util.tree_map_with_path(lambda p, x: arrays.get(path_name(p), x), params)
    return tree, folder, todo


def save_params(workdir: str | Path, params: Any) -> Path:
    """Writes parameters alone, from which ``load_params`` and ``config.init_from`` start.

    Args:
      params: unboxed, arrays of NumPy or JAX.

    Returns:
      ``workdir/checkpoints/0``.

    Raises:
      CheckpointError: the folder has checkpoints already.
    """
    root = (Path(workdir) / "checkpoints").absolute()
    if root.is_dir() and any(root.iterdir()):
        raise CheckpointError(f"{root} has checkpoints already: give another folder.")
    with ocp.StandardCheckpointer() as writer:
        writer.save(root / "0" / "state", {"params": params})
    return root / "0"


def read_params(path: str | Path) -> tuple[Any, Path]:
    """Parameters as they were saved (NumPy), whatever their model, and the folder they are in.

    Raises:
      CheckpointError: nothing there, or not readable.
    """
    folder = find_checkpoint(path)
    shapes = {n: jax.ShapeDtypeStruct(s, "float32") for n, s in _saved_shapes(folder).items()}
    arrays = {name: np.asarray(array) for name, array in _restore(folder, shapes).items()}
    return traverse_util.unflatten_dict(arrays, sep="/"), folder


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the saved parameters."""
    try:
        with ocp.StandardCheckpointer() as reader:
            metadata = reader.metadata(folder / "state").item_metadata.tree["params"]
    except (FileNotFoundError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable parameters ({_first_line(error)})."
        ) from error
    return {path_name(p): tuple(m.shape) for p, m in _leaves(metadata)}


def _restore(folder: Path, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The named parameters, each as its ShapeDtypeStruct (or array) says."""
    tree = {"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            ),
        )
    return traverse_util.flatten_dict(restored["params"], sep="/")


def _saved_grid(folder: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """The patch grid of saved position embeddings: the run's own, else a square one."""
    config = saved_config(folder)
    if config is None:
        return square_grid(shape[0])
    vision = config["model"]["vision"]
    rows, columns = (
        i // p for i, p in zip(vision["image_size"], vision["patch_size"], strict=True)
    )
    return rows, columns


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
