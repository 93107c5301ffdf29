"""One update: accumulation, the teacher, random draws and kept state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug_jax.config import ConfigError
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.training.sharding import make_mesh
from mplug_jax.training.state import TrainState
from mplug_jax.training.step import first_momentum_params, make_train_step
from tests.training.small_pretraining import (
    pretrain_batch,
    pretrain_start,
    pretrain_update,
    small_config,
    write_vocabulary,
)

CONFIG = {
    "lr": 1.0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "warmup_steps": 0,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
    "schedule": "cosine",
    "official": {"epochs": 0, "warmup_units": 0, "steps_per_epoch": 0, "iterations_per_step": 1},
    "rules": (),
}
PARAMS = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25)}
TEACHER = {"w": np.array([1.0, 3.0, -2.0], np.float32), "b": np.float32(-1.0)}


def toy_batch():
    rng = np.random.default_rng(0)
    valid = np.ones(8, bool)
    valid[[1, 3, 4]] = False  # unequal numbers in the two micro-batches
    return {
        "x": rng.normal(size=(8, 3)).astype(np.float32),
        "y": rng.normal(size=8).astype(np.float32),
        "valid": valid,
    }


def squared_error(params, momentum_params, extra, batch, rng, step):
    """Masked mean of a linear model's error; metrics show what else the loss was given."""
    errors = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    loss = jnp.where(batch["valid"], errors, 0.0).sum() / batch["valid"].sum()
    draw = jax.random.uniform(rng)
    metrics = {"draw": draw, "largest": batch["y"].max(), "step": jnp.asarray(step, jnp.float32)}
    if momentum_params is not None:
        metrics["teacher"] = momentum_params["w"].sum() + momentum_params["b"]
    if extra is not None:
        seen = jnp.append(batch["y"][0], draw)
        extra = {
            "rows": extra["rows"].at[extra["next"]].set(seen),
            "next": extra["next"] + 1,
        }
    return loss, extra, metrics


def numpy_loss_and_grads(batch):
    """The toy loss at PARAMS and its gradient, in float64."""
    x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
    errors = (x @ PARAMS["w"] + PARAMS["b"] - y) * batch["valid"]
    count = batch["valid"].sum()
    grads = {"w": 2 * errors @ x / count, "b": 2 * errors.sum() / count}
    return (errors**2).sum() / count, grads


def toy_state(step=0, seed=0, teacher=None, extra=None):
    # Plain gradient descent of rate 1: parameters move by the gradient itself.
    params = jax.tree.map(jnp.asarray, PARAMS)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        seed=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=optax.sgd(1.0).init(params),
        momentum_params=teacher,
        extra=extra,
    )


@functools.cache
def toy_program(accumulate, warmup, frozen, teacher_frozen):
    step = make_train_step(
        squared_error,
        optax.sgd(1.0),
        CONFIG | {"rules": tuple((name, {"freeze": True}) for name in frozen)},
        total_steps=10,
        accumulate=accumulate,
        momentum=0.9,
        momentum_warmup=warmup,
        teacher_frozen=teacher_frozen,
    )
    return jax.jit(step)


def toy_step(state, accumulate=1, warmup=False, frozen=(), teacher_frozen=()):
    with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
        return toy_program(accumulate, warmup, frozen, teacher_frozen)(state, toy_batch())


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_batch_gives_its_gradient_loss_and_rate():
    state, metrics = toy_step(toy_state(step=5))
    loss, grads = numpy_loss_and_grads(toy_batch())
    close(metrics["loss"], loss)
    close(metrics["grad_norm"], np.sqrt((grads["w"] ** 2).sum() + grads["b"] ** 2))
    close(metrics["learning_rate"], 0.5)  # half of the cosine from 1 to 0
    assert metrics["step"] == 5 and state.step == 6
    close(state.params["w"], PARAMS["w"] - grads["w"])
    close(state.params["b"], PARAMS["b"] - grads["b"])


def test_accumulated_gradients_and_metrics_are_means_over_micro_batches():
    batch = toy_batch()
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    losses, grads = zip(*map(numpy_loss_and_grads, halves), strict=True)
    mean = {k: (grads[0][k] + grads[1][k]) / 2 for k in PARAMS}
    assert abs(np.mean(losses) - numpy_loss_and_grads(batch)[0]) > 1e-3  # unlike one large batch

    state, metrics = toy_step(toy_state(), accumulate=2)
    close(state.params["w"], PARAMS["w"] - mean["w"])
    close(state.params["b"], PARAMS["b"] - mean["b"])
    close(metrics["loss"], np.mean(losses))
    close(metrics["largest"], np.mean([half["y"].max() for half in halves]))
    close(metrics["grad_norm"], np.sqrt((mean["w"] ** 2).sum() + mean["b"] ** 2))
    assert state.step == 1


def test_frozen_parameters_take_no_part():
    state, metrics = toy_step(toy_state(), frozen=("w",))
    _, grads = numpy_loss_and_grads(toy_batch())
    np.testing.assert_array_equal(state.params["w"], PARAMS["w"])
    close(state.params["b"], PARAMS["b"] - grads["b"])
    close(metrics["grad_norm"], abs(grads["b"]))


@pytest.mark.parametrize(
    ("step", "warmup", "decay"),
    [(0, False, 0.9), (0, True, 1 / 10), (5, True, 6 / 15), (1000, True, 0.9)],
)
def test_teacher_moves_before_the_loss(step, warmup, decay):
    state, metrics = toy_step(toy_state(step, teacher=TEACHER), warmup=warmup)
    expected = {k: decay * TEACHER[k] + (1 - decay) * PARAMS[k] for k in PARAMS}
    close(state.momentum_params["w"], expected["w"])
    close(state.momentum_params["b"], expected["b"])
    close(metrics["teacher"], expected["w"].sum() + expected["b"])


def test_a_teacher_keeps_what_is_frozen_in_it():
    state, metrics = toy_step(toy_state(teacher=TEACHER), teacher_frozen=("^w$", "w"))
    free, _ = toy_step(toy_state(teacher=TEACHER))
    np.testing.assert_array_equal(state.momentum_params["w"], TEACHER["w"])
    np.testing.assert_array_equal(state.momentum_params["b"], free.momentum_params["b"])
    close(metrics["teacher"], TEACHER["w"].sum() + free.momentum_params["b"])
    for name in PARAMS:
        np.testing.assert_array_equal(state.params[name], free.params[name])


@pytest.mark.parametrize(
    ("patterns", "said"),
    [(("^w$", "^v$"), r"'\^v\$' matches no parameter; .*: w, b\.|b, w"), (("w(",), "no regular")],
)
def test_teacher_patterns_that_cannot_be_used_are_refused(patterns, said):
    with pytest.raises(ConfigError, match="teacher_frozen") as caught:
        toy_step(toy_state(teacher=TEACHER), teacher_frozen=patterns)
    assert re.search(said, str(caught.value))


def test_a_teacher_has_no_copy_of_what_the_student_never_moves():
    config = CONFIG | {"rules": (("^w$", {"freeze": True}),)}
    params = jax.tree.map(jnp.asarray, PARAMS)
    own = first_momentum_params(params, config)
    assert own.keys() == {"b"}
    assert own["b"] == PARAMS["b"]
    # A step donates the state: one buffer cannot be given away twice.
    assert own["b"].unsafe_buffer_pointer() != params["b"].unsafe_buffer_pointer()

    # Its pattern still holds where the teacher has nothing to keep.
    state, metrics = toy_step(
        toy_state(teacher={"b": TEACHER["b"]}), frozen=("w",), teacher_frozen=("^w$",)
    )
    expected = 0.9 * TEACHER["b"] + 0.1 * PARAMS["b"]
    assert state.momentum_params.keys() == {"b"}
    close(state.momentum_params["b"], expected)
    close(metrics["teacher"], PARAMS["w"].sum() + expected)


def test_what_a_teacher_keeps_of_a_trained_parameter_is_its_own():
    first = first_momentum_params(jax.tree.map(jnp.asarray, PARAMS), CONFIG)
    assert first.keys() == PARAMS.keys()
    state = toy_state(teacher=first)
    for _ in range(2):
        state, metrics = toy_step(state, teacher_frozen=("^w$",))
    assert np.abs(state.params["w"] - PARAMS["w"]).max() > 0.1
    np.testing.assert_array_equal(state.momentum_params["w"], PARAMS["w"])
    close(metrics["teacher"], PARAMS["w"].sum() + state.momentum_params["b"])


def test_without_a_teacher_there_is_none():
    state, metrics = toy_step(toy_state())
    assert state.momentum_params is None
    assert "teacher" not in metrics


def test_random_draws_follow_seed_and_step_alone():
    def draw(step, seed):
        return float(toy_step(toy_state(step, seed))[1]["draw"])

    assert draw(3, 0) == draw(3, 0)
    assert len({draw(3, 0), draw(4, 0), draw(3, 1), draw(4, 1)}) == 4


def test_extra_passes_through_micro_batches_in_order():
    extra = {"rows": jnp.zeros((5, 2)), "next": jnp.asarray(0)}
    state, metrics = toy_step(toy_state(extra=extra), accumulate=4)
    assert state.extra["next"] == 4
    rows = np.asarray(state.extra["rows"])
    np.testing.assert_array_equal(rows[:, 0], [*toy_batch()["y"][:4], 0.0])
    assert len(set(rows[:4, 1])) == 4  # each micro-batch draws afresh
    close(metrics["draw"], rows[:4, 1].mean())


def size(tree):
    """Bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_frozen_image_encoder_is_held_once_and_teaches_as_a_copy_would(tmp_path):
    config = small_config(write_vocabulary(tmp_path))
    config.optimizer.rules += (("^visual_encoder/", {"freeze": True}),)
    config.objectives.itm.weight = config.objectives.prefix.weight = 0.0
    task = Pretrain(config, str(tmp_path))
    optimizer, boxed, lean = pretrain_start(task)
    full = lean.replace(momentum_params=lean.teacher())
    encoder = lean.params["visual_encoder"]
    assert size(encoder) > 50_000
    assert size(lean.momentum_params) == size(lean.params) - size(encoder)

    single = make_mesh({"data": 1}, jax.devices()[:1])
    batches = [pretrain_batch(task, 16)] * 3
    (lean, losses), (full, full_losses) = (
        pretrain_update(task, optimizer, boxed, state, single, batches) for state in (lean, full)
    )
    assert size(full) - size(lean) == size(encoder)
    assert len({step["loss"] for step in losses}) == 3
    for ours, theirs in zip(losses, full_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
