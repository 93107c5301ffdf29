"""Pre-training compiled for meshes of eight devices: the same numbers, and nothing held whole.

All four objectives, dropout, teacher and queue are on.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mplug_jax.planning.hlo import KINDS
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.training.sharding import make_mesh, place_local_batch
from tests.training.small_pretraining import (
    pretrain_batch,
    pretrain_start,
    pretrain_step,
    small_config,
    write_vocabulary,
)

pytestmark = pytest.mark.slow

SIZE, QUEUE, DEPTH, STEPS, POOL = 16, 512, 3, 20, 2
ONE = {"data": 1}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data_fsdp": {"data": 4, "fsdp": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


class Run(NamedTuple):
    """A program, its losses by step, and the states after the first step and the last."""

    program: Any
    metrics: list[dict[str, float]]
    first: Any
    last: Any


class Runs:
    """Runs on demand, each kept for all tests."""

    def __init__(self, folder: Any):
        config = small_config(write_vocabulary(folder))
        config.model.vision.update({"depth": DEPTH, "attention_dropout": 0.1})
        config.model.text.update({"depth": DEPTH, "dropout": 0.1, "attention_dropout": 0.1})
        config.objectives.itc.queue_size = QUEUE
        self.task = Pretrain(config, str(folder))
        self.pooled = Pretrain(config.copy_and_resolve_references(), str(folder))
        self.pooled.config.objectives.itm.pool = POOL
        self.start = pretrain_start(self.task)
        self.batches = [pretrain_batch(self.task, SIZE, SIZE * i) for i in range(STEPS)]
        self._kept: dict[tuple[Any, ...], Run] = {}

    def __call__(self, shape: dict[str, int], *, pooled: bool = False) -> Run:
        """A run on a mesh; ``pooled``: with negatives from pools of rows."""
        key = (*shape.items(), pooled)
        if key not in self._kept:
            mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
            task = self.pooled if pooled else self.task
            program, shardings = pretrain_step(task, *self.start, mesh)
            state, metrics, states = jax.device_put(self.start[2], shardings), [], []
            for batch in self.batches:
                state, scalars = program(state, place_local_batch(batch, mesh))
                metrics.append(jax.tree.map(float, scalars))
                if len(states) < 1 or len(metrics) == STEPS:
                    states.append(jax.tree.map(np.asarray, state))
            self._kept[key] = Run(program, metrics, *states)
        return self._kept[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", MESHES)
def test_losses_of_twenty_steps_do_not_depend_on_the_mesh(runs, name):
    one, other = runs(ONE), runs(MESHES[name])
    names = ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_prefix")
    for ours, theirs in zip(other.metrics, one.metrics, strict=True):
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-5)
    losses = [step["loss"] for step in one.metrics]
    assert max(losses) - min(losses) > 1


@pytest.mark.parametrize("name", MESHES)
def test_the_first_update_does_not_depend_on_the_mesh(runs, name):
    """Adam's first moment after one step is the gradient, times 0.1."""
    start, one, other = runs.start[2], runs(ONE).first, runs(MESHES[name]).first
    for part, tolerance in (
        ("opt_state", 1e-6),
        ("params", 1e-5),
        ("momentum_params", 1e-5),
        ("extra", 1e-5),
    ):
        jax.tree.map(
            lambda a, b, atol=tolerance: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol),
            getattr(other, part),
            getattr(one, part),
        )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # a hundred times what is allowed to differ


def test_the_queue_holds_the_batches_in_order_on_any_mesh(runs):
    valid = np.concatenate([b["image_id"][b["valid"]] for b in runs.batches])
    for shape in (ONE, *MESHES.values()):
        queue = runs(shape).last.extra
        assert queue.pointer == len(valid) == 15 * STEPS
        np.testing.assert_array_equal(queue.ids[: len(valid)], valid)
        assert (queue.ids[len(valid) :] == -100).all()


def arrays(program: Any) -> set[tuple[int, ...]]:
    """Shapes of all float arrays that one device holds at any time."""
    found = re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    return {tuple(map(int, dims.split(","))) for dims in found}


def gathered(program: Any) -> set[tuple[int, ...]]:
    """Shapes of the float arrays that are made of other devices' parts."""
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", program.as_text())
    return {
        tuple(map(int, dims.split(",")))
        for line in lines
        for dims in re.findall(r"\bf32\[([\d,]+)\]", line)
    }


def exchanged(program: Any) -> list[int]:
    """Numbers in each float array that a collective makes."""
    lines = re.findall(rf"= (.*?) (?:{'|'.join(KINDS)})(?:-start)?\(", program.as_text())
    return [
        math.prod(map(int, dims.split(",")))
        for line in lines
        for dims in re.findall(r"\bf32\[([\d,]+)\]", line)
    ]


def test_pictures_stay_where_a_device_holds_whole_pools(runs):
    """Keys and values of a picture are as large as its tokens."""
    model = runs.task.model_config
    tokens = 1 + math.prod(model.vision.grid)
    pictures = SIZE * tokens * model.text.width
    assert max(exchanged(runs(MESHES["data"]).program)) >= pictures
    own = exchanged(runs(MESHES["data"], pooled=True).program)
    # Gradients of all layers' weights are the largest there.
    assert own and max(own) <= max(x.size for x in jax.tree.leaves(runs.start[2].params)) < pictures


def stacks(params: Any) -> set[tuple[int, ...]]:
    """Shapes of the matrices that stand for all layers of an encoder."""
    return {
        x.shape
        for tower in ("visual_encoder", "text_encoder")
        for x in jax.tree.leaves(params[tower]["blocks"])
        if x.ndim > 2 and x.size > DEPTH * 64
    }


def test_under_fsdp_a_layer_gathers_its_weights_when_it_is_its_turn(runs):
    params = runs.start[2].params
    whole = stacks(params)
    assert (DEPTH, 32, 64) in whole and (DEPTH, 64, 32) in whole
    assert whole <= arrays(runs(MESHES["data"]).program)  # there they are held whole

    program = runs(MESHES["fsdp"]).program
    assert not whole & arrays(program)
    layers = {shape[1:] for shape in whole}
    assert layers & gathered(program) == layers


@pytest.mark.parametrize("name", MESHES)
def test_neither_queue_nor_similarities_are_whole_on_a_device(runs, name):
    features = runs.task.model_config.embed_dim
    similarities, bank = (SIZE, SIZE + QUEUE), (SIZE + QUEUE, features)
    assert {similarities, bank, (QUEUE, features)} <= arrays(runs(ONE).program)

    found = arrays(runs(MESHES[name]).program)
    assert not {similarities, similarities[::-1], bank, (QUEUE, features)} & found
    mesh = make_mesh(MESHES[name])
    parts, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    assert (SIZE // tensor, (SIZE + QUEUE) // parts) in found
    assert (QUEUE // parts, features) in found


@pytest.mark.parametrize(("name", "share"), [("fsdp", 1 / 8), ("all", 1 / 4)])
def test_a_device_is_given_its_share_of_state_and_batch(runs, name, share):
    """Only vectors, of which a model this narrow has many, may be held whole."""
    one, other = (
        runs(shape).program.memory_analysis().argument_size_in_bytes
        for shape in (ONE, MESHES[name])
    )
    assert share <= other / one < share * 1.25
