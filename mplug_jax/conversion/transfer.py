"""Moves arrays between a state dict and our parameters along the rows of ``names``."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mplug_jax.conversion.names import Row
from mplug_jax.conversion.report import ConversionError, Report
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import init_params
from mplug_jax.models.vit import resize_positions

POSITIONS = "visual_encoder/position_embedding"
Arrays = dict[str, np.ndarray]
Tensors = Mapping[str, np.ndarray]


def heads_of(path: str, config: ModelConfig) -> int:
    """Attention heads of the part that a parameter belongs to."""
    return config.vision.heads if path.startswith("visual_encoder/") else config.text.heads


@functools.lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path."""
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {k: tuple(v.shape) for k, v in flatten_dict(nn.meta.unbox(boxed), sep="/").items()}


def initial_arrays(config: ModelConfig, seed: int, paths: Iterable[str]) -> Arrays:
    """The named parameters as ``init_params`` draws them; the others are not computed."""
    wanted = sorted(paths)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(nn.meta.unbox(init_params(config, key)), sep="/")
        return {path: flat[path] for path in wanted}

    # Compiling takes far longer than the one run: optimise as little as possible.
    compiled = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})
    return {name: np.array(value) for name, value in compiled(jax.random.key(seed)).items()}


class Filling:
    """Parameters in the making: which arrays and which layers the files have given so far."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.shapes = parameter_shapes(config)
        self._arrays: Arrays = {}
        self._layers: dict[str, set[int]] = defaultdict(set)  # those that stacked arrays hold

    def fill(self, rows: Iterable[Row], tensors: Tensors, report: Report) -> list[Row]:
        """Takes the tensors that the rows name.

        Returns:
          the rows whose tensor is not there.

        Raises:
          ConversionError: with every tensor whose shape does not fit the config.
        """
        absent, problems = [], []
        for row in rows:
            if row.name not in tensors:
                absent.append(row)
                continue
            array = self._fitted(row, np.asarray(tensors[row.name]), report)
            shape = self.theirs(row)
            if array.shape != shape:
                problems.append(f"  {row.name}: {array.shape} in the file, {shape} in the model")
                continue
            if row.part is not None:
                array = np.split(array, 3)[row.part]
            self._put(row, row.layout.load(array, heads_of(row.path, self.config)))
            report.used.setdefault(row.name, []).append(row.place)
        if problems:
            raise ConversionError(
                "Tensors that do not fit the model:\n"
                + "\n".join(problems)
                + "\nUse a config with the file's sizes, or none: they are read off the tensors."
            )
        return absent

    def _put(self, row: Row, array: np.ndarray) -> None:
        if row.layer is None:
            self._arrays[row.path] = np.asarray(array, np.float32, order="C")
            return
        if row.path not in self._arrays:
            self._arrays[row.path] = np.empty(self.shapes[row.path], np.float32)
        self._arrays[row.path][row.layer] = array
        self._layers[row.path].add(row.layer)

    def theirs(self, row: Row) -> tuple[int, ...]:
        """The shape that the whole tensor of a row must have for this config."""
        ours = self.shapes[row.path][0 if row.layer is None else 1 :]
        shape = row.layout.store(np.broadcast_to(np.float32(0), ours), 0).shape
        return shape if row.part is None else (3 * shape[0], *shape[1:])

    def _fitted(self, row: Row, array: np.ndarray, report: Report) -> np.ndarray:
        """Position embeddings of another picture size, resampled for the config's."""
        wanted = self.theirs(row)
        if row.path != POSITIONS or array.shape == wanted or array.shape[-1] != wanted[-1]:
            return array
        table = array.reshape(-1, array.shape[-1])
        old, new = (square_side(len(table) - 1),) * 2, self.config.vision.grid
        report.resized[row.name] = f"positions resampled bilinearly from {old} patches to {new}"
        return np.asarray(resize_positions(table, old, new)).reshape(wanted)

    def complete(self, seed: int) -> Any:
        """The parameter tree; what no file gave is drawn from the seed."""
        lacking = self._lacking()
        drawn = initial_arrays(self.config, seed, {path for path, _ in lacking}) if lacking else {}
        for path, layer in lacking:
            if layer is None:
                self._arrays[path] = drawn[path]
            else:
                self._arrays[path][layer] = drawn[path][layer]
        return unflatten_dict(self._arrays, sep="/")

    def _lacking(self) -> list[tuple[str, int | None]]:
        """(path, layer) of what no file has given; layer None: the whole parameter."""
        result: list[tuple[str, int | None]] = []
        for path, shape in self.shapes.items():
            if path not in self._arrays:
                result.append((path, None))
            elif path in self._layers:
                result += [(path, i) for i in range(shape[0]) if i not in self._layers[path]]
        return result

    def settle(self, report: Report, otherwise: str) -> None:
        """Makes the report name exactly what ``complete`` draws.

        A stack whose layers all lack becomes one entry; what nobody has spoken of stays at init
        for the reason ``otherwise``.
        """
        for path, layer in self._lacking():
            place = path if layer is None else f"{path} [{layer}]"
            stacked = layer is None and "/blocks/" in path
            stack = [f"{path} [{i}]" for i in range(self.shapes[path][0] if stacked else 0)]
            for items in (report.initial, report.missing):
                reasons = [items.pop(name) for name in stack if name in items]
                if reasons:
                    items[place] = reasons[0]
            if place not in report.missing:
                report.initial.setdefault(place, otherwise)


def square_side(patches: int) -> int:
    """Patches on a side of a square grid.

    Raises:
      ConversionError: the grid is not square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConversionError(
            f"{patches} position embeddings are no square grid of patches: which grid they "
            "belong to cannot be read off the file."
        )
    return side


def export(rows: Iterable[Row], params: Any, config: ModelConfig) -> Arrays:
    """Our parameters (or gradients) under the names of the rows; rows without one are left out."""
    flat = flatten_dict(params, sep="/")
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.part or 0):
        if row.path not in flat:
            continue
        array = np.asarray(flat[row.path])
        array = array if row.layer is None else array[row.layer]
        parts[row.name].append(row.layout.store(array, heads_of(row.path, config)))
    return {
        name: np.asarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), order="C")
        for name, arrays in parts.items()
    }
