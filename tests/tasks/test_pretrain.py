"""The pre-training loss against its parts computed one by one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mplug_jax.tasks.pretrain import Pretrain
from tests.tasks.pretraining import INVALID, RNG, shrunk

pytestmark = pytest.mark.slow

NAMES = ("itc", "itm", "mlm", "prefix")


def with_teacher(alpha: float) -> ConfigDict:
    config = shrunk()
    config.objectives.update({"momentum": 0.9, "alpha_ramp_steps": 4})
    config.objectives.itc.update({"alpha": alpha, "queue_size": 10})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = alpha
    return config


@pytest.fixture(scope="module")
def momentum_params(params):
    """Near the parameters, not equal to them."""
    return jax.tree.map(lambda x: 0.9 * x + 0.01, params)


@pytest.fixture(scope="module")
def scrambled(batch):
    """The same valid rows beside other invalid ones."""
    rng = np.random.default_rng(0)
    rows = {name: value.copy() for name, value in batch.items()}
    for name, value in rows.items():
        if name not in ("valid", "bad"):
            noise = rng.integers(0, 100, value[INVALID].shape)
            value[INVALID] = noise % 2 if value.dtype == bool else noise
    rows["image_id"][INVALID[0]] = rows["image_id"][0]
    return rows


@pytest.fixture(scope="module")
def plain_gradient(plain, params):
    """(loss, metrics), gradient as a function of the batch."""

    def loss(params, batch):
        total, _, metrics = plain.loss(params, None, None, batch, RNG, jnp.int32(0))
        return total, metrics

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: gradient(params, batch)


@pytest.fixture(scope="module")
def teacher(build):
    return build(with_teacher(0.4))


@pytest.fixture(scope="module")
def teacher_loss(teacher, params, momentum_params):
    loss = jax.jit(teacher.loss)
    return lambda extra, batch, step: loss(
        params, momentum_params, extra, batch, RNG, jnp.int32(step)
    )


@pytest.fixture(scope="module")
def queue(teacher):
    return teacher.init_extra(jax.random.key(3))


def cross_entropy(logits: Any, labels: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    picked = np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def test_total_is_the_weighted_sum(build, params, batch, plain_gradient):
    (total, metrics), _ = plain_gradient(batch)
    terms = {name: float(metrics[f"loss_{name}"]) for name in NAMES}
    assert min(terms.values()) > 0
    np.testing.assert_allclose(total, sum(terms.values()), rtol=1e-5)
    config = shrunk()
    weights = dict(zip(NAMES, (0.5, 2.0, 3.0, 0.25), strict=True))
    for name, weight in weights.items():
        config.objectives[name].weight = weight
    task = build(config)
    total, _, metrics = jax.jit(task.loss)(params, None, None, batch, RNG, jnp.int32(0))
    for name in NAMES:
        np.testing.assert_allclose(metrics[f"loss_{name}"], terms[name], rtol=1e-5)
    np.testing.assert_allclose(total, sum(weights[n] * terms[n] for n in NAMES), rtol=1e-5)


@pytest.mark.parametrize("off", [("itc", "itm"), ("itm",), ("mlm",), ("prefix",)])
def test_an_objective_without_weight_is_left_out(build, params, batch, plain_gradient, off):
    config = shrunk()
    for name in off:
        config.objectives[name].weight = 0.0
    task = build(config)
    total, _, metrics = jax.jit(task.loss)(params, None, None, batch, RNG, jnp.int32(0))
    rest = [name for name in NAMES if name not in off]
    assert {n for n in metrics if n.startswith("loss_")} == {f"loss_{n}" for n in rest}
    (_, all_metrics), _ = plain_gradient(batch)
    np.testing.assert_allclose(total, sum(all_metrics[f"loss_{n}"] for n in rest), rtol=1e-5)


def test_a_queue_is_made_only_for_itc(build, plain, queue):
    assert plain.init_extra(jax.random.key(0)) is None
    assert not plain.uses_momentum
    assert queue.image.shape == queue.text.shape == (10, 16)
    config = with_teacher(0.4)
    config.objectives.itc.weight = config.objectives.itm.weight = 0.0
    task = build(config)
    assert task.uses_momentum
    assert task.init_extra(jax.random.key(0)) is None


def test_invalid_rows_change_neither_loss_nor_gradient(plain_gradient, batch, scrambled):
    assert not np.array_equal(batch["image"], scrambled["image"])
    (total, metrics), gradient = plain_gradient(batch)
    (other, other_metrics), other_gradient = plain_gradient(scrambled)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6, err_msg=name)
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_valid_rows_do_change_the_loss(plain_gradient, batch):
    changed = {name: value.copy() for name, value in batch.items()}
    changed["image"][0] = 255 - changed["image"][0]
    (total, _), _ = plain_gradient(batch)
    (other, _), _ = plain_gradient(changed)
    assert abs(float(total) - float(other)) > 1e-3


def test_invalid_rows_change_nothing_with_teacher_and_queue(teacher_loss, queue, batch, scrambled):
    total, extra, metrics = teacher_loss(queue, batch, 3)
    other, other_extra, other_metrics = teacher_loss(queue, scrambled, 3)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(extra), jax.tree.leaves(other_extra), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_queue_takes_the_teachers_features(teacher_loss, queue, batch, call, momentum_params):
    kept = np.flatnonzero(batch["valid"])
    texts = call("encode_text", batch["text_ids"], batch["text_mask"], weights=momentum_params)
    images = call("encode_image", batch["image"], weights=momentum_params)
    text_feats = np.asarray(call("project_text", texts, weights=momentum_params))[kept]
    image_feats = np.asarray(call("project_image", images, weights=momentum_params))[kept]
    online = np.asarray(call("project_image", call("encode_image", batch["image"])))[kept]
    assert np.abs(online - image_feats).max() > 1e-2  # else this could not tell them apart

    _, once, _ = teacher_loss(queue, batch, 0)
    assert int(once.pointer) == len(kept) == 6
    np.testing.assert_allclose(once.image[:6], image_feats, atol=1e-5)
    np.testing.assert_allclose(once.text[:6], text_feats, atol=1e-5)
    np.testing.assert_array_equal(once.ids[:6], batch["image_id"][kept])
    np.testing.assert_array_equal(once.image[6:], queue.image[6:])
    np.testing.assert_array_equal(once.ids[6:], queue.ids[6:])

    _, twice, _ = teacher_loss(once, batch, 1)  # around the end of the ten rows
    slots = (6 + np.arange(6)) % 10
    assert int(twice.pointer) == 2
    np.testing.assert_allclose(np.asarray(twice.text)[slots], text_feats, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(twice.ids)[slots], batch["image_id"][kept])
    np.testing.assert_array_equal(twice.image[2:6], once.image[2:6])


def test_alpha_rises_from_nothing(build, teacher_loss, queue, batch, params, momentum_params):
    start, half, full, beyond = (teacher_loss(queue, batch, step) for step in (0, 2, 4, 400))
    hard = jax.jit(build(with_teacher(0.0)).loss)(
        params, momentum_params, queue, batch, RNG, jnp.int32(100)
    )
    for name in NAMES:
        key = f"loss_{name}"
        np.testing.assert_allclose(start[2][key], hard[2][key], rtol=1e-5, err_msg=key)
        # Every term is linear in alpha, and alpha in the step.
        middle = (float(start[2][key]) + float(full[2][key])) / 2
        np.testing.assert_allclose(half[2][key], middle, rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(beyond[2][key], full[2][key], rtol=1e-6, err_msg=key)
        moved = abs(float(full[2][key]) - float(start[2][key]))
        assert (moved < 1e-6) if name == "itm" else (moved > 1e-4), key
    np.testing.assert_allclose(start[0], hard[0], rtol=1e-5)


def test_prefix_loss_is_that_of_the_decoder_alone(plain_gradient, batch, call):
    images = call("encode_image", batch["image"])
    texts = call("encode_text", batch["prefix_ids"], batch["prefix_mask"])
    fused = call("fuse", images, texts, batch["prefix_mask"])
    logits = call(
        "decode", batch["target_ids"][:, :-1], *call("memory", *fused, batch["prefix_mask"])
    )
    counted = batch["target_mask"][:, 1:] & batch["valid"][:, None]
    expected = cross_entropy(logits, batch["target_ids"][:, 1:])[counted].mean()
    (_, metrics), _ = plain_gradient(batch)
    np.testing.assert_allclose(metrics["loss_prefix"], expected, rtol=1e-4)


def test_rematerialisation_changes_no_loss_and_no_gradient(build, params, batch, plain_gradient):
    config = shrunk()
    config.model.remat = "full"
    task = build(config)

    def gradient(task: Pretrain) -> Any:
        def loss(params):
            arrays = jax.tree.map(jnp.asarray, batch)
            return task.loss(params, None, None, arrays, RNG, jnp.int32(0))[0]

        return jax.value_and_grad(loss)

    def repeats(function: Any) -> bool:
        return "prevent_cse" in str(jax.make_jaxpr(function)(params))

    assert repeats(gradient(task))
    assert not repeats(gradient(task.without_remat()))
    assert task.model_config.remat == "full"  # the task itself is unchanged
    total, grads = jax.jit(gradient(task))(params)
    (expected, _), expected_grads = plain_gradient(batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
