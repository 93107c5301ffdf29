"""Checkpoints of a few small arrays and an iterator, for those who save and restore them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug_jax.data.pipeline import TrainIterator, train_iterator
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.objectives.itc import init_queue
from mplug_jax.training.checkpoint import Checkpointer
from mplug_jax.training.state import TrainState, create_state

SETTINGS = {"keep_last": 2, "best_metric": "", "best_mode": "max", "wait": False}
BEST = SETTINGS | {"best_metric": "retrieval/r_mean"}
# Values that a conversion on the way to disk would change.
AWKWARD = np.array([np.nan, -0.0, np.inf, 1e-42, 1 + 2**-23], np.float32)


def params(width: int = 3) -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(1), (5, width))
    return {"head": {"kernel": kernel, "bias": jnp.asarray(AWKWARD)}, "temperature": jnp.ones(())}


def make_state(tree: dict[str, Any], step: int = 0) -> TrainState:
    extra = init_queue(jax.random.key(2), 6, 4)
    teacher = jax.tree.map(lambda x: x * 0.5, tree)
    state = create_state(tree, optax.adamw(1e-3), extra, 9, teacher)
    return state.replace(step=jnp.int32(step))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def example(record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"image_id": np.int32(record["image_id"]), "draw": np.float32(rng.random())}


def iterator() -> TrainIterator:
    source = Scenes("easy", "train", size=32)
    return train_iterator([(source, 1.0)], example, seed=3, batch_size=5, threads=0)


@contextlib.contextmanager
def opened(workdir: Path, settings: dict[str, Any]):
    with contextlib.closing(Checkpointer(workdir, settings)) as checkpointer:
        yield checkpointer


def write(workdir: Path, tree: dict[str, Any], step: int = 3) -> None:
    with opened(workdir, SETTINGS) as checkpointer:
        checkpointer.save(step, make_state(tree, step), iterator(), {})


def kept(workdir: Path) -> set[int]:
    return {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def restored_step(workdir: Path, settings: dict[str, Any] = SETTINGS) -> int:
    """Opens the run as a training process does, and restores its newest checkpoint."""
    with opened(workdir, settings) as checkpointer:
        step = checkpointer.latest_step()
        state = make_state(params(), step)
        assert_same_bits(checkpointer.restore(step, abstract(state), iterator()), state)
    return step
