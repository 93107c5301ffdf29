"""Orbax checkpoints: the train state and the data iterator, saved together and asynchronously.

A checkpoint carries checksums over its files. A damaged one is set aside, never deleted, and the
one before it is taken.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mplug_jax.training.declared import declared_shapes
from mplug_jax.training.initialise import (
    FRAMES,
    Plan,
    grown,
    plan,
    resized,
    resized_frames,
    square_grid,
)
from mplug_jax.training.integrity import (
    CheckpointError,
    check_parameters,
    data_position,
    find_checkpoint,
    newest_whole,
    set_damaged_aside,
    write_checksums,
)
from mplug_jax.training.orbax_settings import set_orbax_up
from mplug_jax.training.state import TrainState, path_name

logger = logging.getLogger(__name__)
set_orbax_up()


class Checkpointer:
    """Saves and restores (state, iterator) under ``workdir/checkpoints/<step>``.

    Keeps the newest ``keep_last`` checkpoints and the best by ``best_metric``. What is no longer
    kept is deleted once its successor is complete, not before. The newest checkpoint is verified
    when the folder is opened, at about a second a gigabyte; those found damaged become
    ``<step>.damaged``.

    Raises:
      CheckpointError: there are checkpoints, but none is whole; nothing was changed.
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
        self._metric, self._waits = metric, config["wait"]
        self.folder = (Path(workdir) / "checkpoints").absolute()
        self._saving = 0
        self._failure: Exception | None = None
        self._littered = False
        # Before Orbax opens the folder, which reads the metrics of every checkpoint in it.
        set_damaged_aside(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                # The policy decides; without this, Orbax would not write the metrics to disk, and
                # a continued run would delete its best checkpoint.
                best_fn=rank if metric else None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, iterator: Any, metrics: Mapping[str, float]
    ) -> None:
        """Starts saving; returns once the arrays are copied off the device.

        With ``config.checkpoint.wait`` it returns once the checkpoint is complete on disk.

        A save that fails, on a full disk above all, does not end the training: it is logged as an
        error when the next one starts, and all earlier checkpoints stay. ``wait`` raises it.

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
        self._tell(self._finish())
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(iterator.get_state()),
                ),
                metrics=best,
            )
        except OSError as error:
            self._failure = error
        if self._waits:
            try:
                self._manager.wait_until_finished()
            except Exception as error:  # kept, so that the next call tells or raises it
                self._failure = error

    def complete(self, step: int, state: TrainState, iterator: Any) -> bool:
        """Waits until ``step`` is on disk, saved without metrics if need be; whether it was.

        Raises CheckpointError if it could not be saved.
        """
        self._tell(self._finish())
        if self.latest_step() == step:
            return False
        self.save(step, state, iterator, {})
        self.wait()
        return True

    def restore(self, step: int, abstract_state: Any, iterator: Any) -> TrainState:
        """Restores the state in the given shardings and moves ``iterator`` to its position.

        Both may come from another mesh and another number of processes.
        """
        return _restored(self._manager, step, abstract_state, iterator)

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
          CheckpointError: it could not be saved.
        """
        if (error := self._finish()) is not None:
            raise error

    def close(self) -> None:
        """Finishes the save under way and lets go of the directory.

        That this save failed is logged, not raised, as it would hide what ends the training.
        """
        self._tell(self._finish())
        self._manager.close()

    def _finish(self) -> CheckpointError | None:
        """Waits for the save under way, and clears away what failed ones have left."""
        failure, self._failure = self._failure, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # each writer has its own; TensorStore's is a ValueError
            failure = error
        self._littered |= failure is not None
        if self._littered and jax.process_index() == 0:
            # When one writer fails, others may write on for a moment, so every later call looks
            # for their files again.
            for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
        if failure is None:
            return None
        # Orbax has forgotten the checkpoints that this one would have replaced.
        self._manager.reload()
        newest = self.latest_step()
        back = "its start" if newest is None else f"step {newest}"
        return CheckpointError(
            f"The checkpoint of step {self._saving} could not be saved in {self.folder} "
            f"({_reason(failure)}). Free some space: as things are, a run that is started again "
            f"continues from {back}."
        )

    def _tell(self, error: CheckpointError | None) -> None:
        if error is not None:
            logger.error("%s", error)

    def _add_checksums(self) -> None:
        """Orbax calls this on process 0 when all is written, just before it names the folder."""
        for partial in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            write_checksums(partial)


class WholeCheckpoints:
    """The whole checkpoints of a workdir up to a step, to be read: nothing in it is changed."""

    def __init__(self, workdir: str | Path, most: int):
        self.folder = (Path(workdir) / "checkpoints").absolute()
        self._most = most

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None. Verifies, at about a second a gigabyte."""
        return newest_whole(self.folder, self._most)

    def restore(self, step: int, abstract_state: Any, iterator: Any) -> TrainState:
        """As ``Checkpointer.restore``."""
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(self.folder, options=options) as manager:
            return _restored(manager, step, abstract_state, iterator)


def _restored(
    manager: ocp.CheckpointManager, step: int, abstract_state: Any, iterator: Any
) -> TrainState:
    try:
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint of step {step} in {manager.directory} does not fit this config "
            f"({_first_line(error)}). Use the config it was made with, or another --workdir and "
            "--config.init_from to start from its parameters."
        ) from error
    iterator.set_state(data_position(Path(manager.directory) / str(step) / "data"))
    return restored["state"]


def _reason(error: Exception) -> str:
    """The system's own words, which come last among the nested ones of TensorStore."""
    return _first_line(error, most=2000).rpartition(": ")[2]


def _first_line(error: Exception, most: int = 300) -> str:
    return str(error).strip().splitlines()[0][:most] if str(error).strip() else repr(error)


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
      CheckpointError: with the full symmetric difference of names and the shapes that differ, or
        the files that are damaged.
    """
    folder = find_checkpoint(path)
    check_parameters(folder)
    wanted = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
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
        if name == FRAMES:
            arrays[name] = resized_frames(arrays[name], len(wanted[name]))
        else:
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
    write_checksums(root / "0")
    return root / "0"


def read_params(path: str | Path) -> tuple[Any, Path]:
    """Parameters as they were saved (NumPy), whatever their model, and the folder they are in.

    Raises:
      CheckpointError: nothing there, not readable, or damaged.
    """
    folder = find_checkpoint(path)
    check_parameters(folder)
    shapes = {n: jax.ShapeDtypeStruct(s, "float32") for n, s in _saved_shapes(folder).items()}
    arrays = {name: np.asarray(array) for name, array in _restore(folder, shapes).items()}
    return traverse_util.unflatten_dict(arrays, sep="/"), folder


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the saved parameters."""
    try:
        with ocp.StandardCheckpointer() as reader:
            metadata = reader.metadata(folder / "state").item_metadata.tree["params"]
    except (FileNotFoundError, KeyError, AttributeError, ValueError) as error:
        message = f"{folder} holds no readable parameters ({_first_line(error)})."
        raise CheckpointError(message) from error
    return declared_shapes(folder, metadata)


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


def saved_config(path: str | Path) -> dict[str, Any] | None:
    """The config.json of the run a checkpoint belongs to, or None."""
    folder = find_checkpoint(path)
    for parent in (folder.parent.parent, folder.parent, folder):
        file = parent / "config.json"
        if file.is_file():
            return json.loads(file.read_text())
    return None
