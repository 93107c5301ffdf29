"""The pre-training loss against its parts computed one by one."""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.objectives.itc import ITCOutput
from mplug_jax.objectives.itm import sample_negatives
from mplug_jax.tasks.pretrain import Pretrain, Texts
from mplug_jax.validation import validate

pytestmark = pytest.mark.slow

SIZE = 8
RNG = jax.random.key(5)
INVALID = np.array([3, 6])
NAMES = ("itc", "itm", "mlm", "prefix")


def shrunk() -> ConfigDict:
    """The quickstart, small enough to compile in seconds: no dropout, teacher or queue."""
    config = quickstart.get_config()
    config.batch_size = SIZE
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.decoder.depth = 1
    config.model.update({"embed_dim": 16, "scan_unroll": 1})
    config.objectives.itm.fraction = 1.0
    config.data.train = ({**config.data.train[0], "size": 64},)
    config.data.tokenizer.vocab_size = 128
    return config


def with_teacher(alpha: float) -> ConfigDict:
    config = shrunk()
    config.objectives.update({"momentum": 0.9, "alpha_ramp_steps": 4})
    config.objectives.itc.update({"alpha": alpha, "queue_size": 10})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = alpha
    return config


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("tokenizer"))

    def build(config: ConfigDict) -> Pretrain:
        validate(config)
        return Pretrain(config, workdir)

    return build


def compiled(function: Any) -> Any:
    """Optimised less: this compiles for longer than it runs."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def plain(build) -> Pretrain:
    return build(shrunk())


@pytest.fixture(scope="module")
def params(plain):
    return nn.meta.unbox(jax.jit(plain.init_params)(jax.random.key(0)))


@pytest.fixture(scope="module")
def momentum_params(params):
    """Near the parameters, not equal to them."""
    return jax.tree.map(lambda x: 0.9 * x + 0.01, params)


@pytest.fixture(scope="module")
def batch(plain):
    rows = next(
        train_iterator(plain.sources, plain.make_example, seed=1, batch_size=SIZE, threads=0)
    )
    rows["valid"][INVALID] = False
    rows["image_id"][1] = rows["image_id"][0]  # two captions of one picture
    return rows


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

    gradient = compiled(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: gradient(params, batch)


@pytest.fixture(scope="module")
def teacher(build):
    return build(with_teacher(0.4))


@pytest.fixture(scope="module")
def teacher_loss(teacher, params, momentum_params):
    loss = compiled(teacher.loss)
    return lambda extra, batch, step: loss(
        params, momentum_params, extra, batch, RNG, jnp.int32(step)
    )


@pytest.fixture(scope="module")
def queue(teacher):
    return teacher.init_extra(jax.random.key(3))


@pytest.fixture(scope="module")
def call(plain, params):
    """A model method, compiled, by name."""
    methods: dict[str, Any] = {}

    def call(name: str, *args: Any, weights: Any = params) -> Any:
        if name not in methods:
            methods[name] = compiled(
                lambda weights, *args: plain.setup.model.apply(
                    {"params": weights}, *args, method=name
                )
            )
        return methods[name](weights, *args)

    return call


def cross_entropy(logits: Any, labels: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    picked = np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def itm_key() -> jax.Array:
    return jax.random.fold_in(RNG, zlib.crc32(b"itm") & 0x7FFFFFFF)


def similarities() -> ITCOutput:
    sims = np.random.default_rng(4).normal(size=(2, SIZE, SIZE)).astype(np.float32)
    return ITCOutput(jnp.zeros(()), jnp.zeros(()), jnp.asarray(sims[0]), jnp.asarray(sims[1]))


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
    total, _, metrics = compiled(task.loss)(params, None, None, batch, RNG, jnp.int32(0))
    for name in NAMES:
        np.testing.assert_allclose(metrics[f"loss_{name}"], terms[name], rtol=1e-5)
    np.testing.assert_allclose(total, sum(weights[n] * terms[n] for n in NAMES), rtol=1e-5)


@pytest.mark.parametrize("off", [("itc", "itm"), ("itm",), ("mlm",), ("prefix",)])
def test_an_objective_without_weight_is_left_out(build, params, batch, plain_gradient, off):
    config = shrunk()
    for name in off:
        config.objectives[name].weight = 0.0
    task = build(config)
    total, _, metrics = compiled(task.loss)(params, None, None, batch, RNG, jnp.int32(0))
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
    hard = compiled(build(with_teacher(0.0)).loss)(
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


def test_fused_rows_are_the_separate_passes(plain, params, batch, call):
    ids = np.concatenate([batch["text_ids"], batch["text_ids"], batch["prefix_ids"]])
    ids[SIZE : SIZE + 2, 1] = plain.setup.tokenizer.mask_id  # stands for the masked texts
    mask = np.concatenate([batch["text_mask"], batch["text_mask"], batch["prefix_mask"]])

    def together(params, ids, mask, batch):
        texts = Texts(ids, mask, None, None, batch["target_ids"], batch["target_mask"])
        encoded = plain._encode(params, batch["image"], texts, None)
        rows = plain._fused_rows(itm_key(), similarities(), batch)
        return plain._fused_outputs(params, encoded, texts, rows, None)

    outputs = compiled(together)(params, ids, mask, batch)

    sims = similarities()
    negatives = sample_negatives(
        itm_key(), sims.image_to_text, sims.text_to_image, batch["image_id"], batch["valid"]
    )
    images = np.asarray(call("encode_image", batch["image"]))
    texts, masked, prefix = np.split(np.asarray(call("encode_text", ids, mask)), 3)
    own_mask, _, prefix_mask = np.split(mask, 3)

    def match(image: Any, text: Any, text_mask: Any) -> np.ndarray:
        return np.asarray(call("match", call("fuse", image, text, text_mask)[1]))

    other_images = images[negatives.image_for_text]
    chosen = np.asarray(negatives.text_for_image)
    positives, wrong_image, wrong_text = np.split(np.asarray(outputs["itm"]), 3)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(positives, match(images, texts, own_mask), **close)
    np.testing.assert_allclose(wrong_image, match(other_images, texts, own_mask), **close)
    np.testing.assert_allclose(wrong_text, match(images, texts[chosen], own_mask[chosen]), **close)
    assert np.abs(positives - wrong_image).max() > 1e-2
    assert np.abs(positives - wrong_text).max() > 1e-2

    mlm = call("mlm_logits", call("fuse", images, masked, own_mask)[1])
    np.testing.assert_allclose(outputs["mlm"], mlm, rtol=1e-3, atol=1e-4)
    memory = call("memory", *call("fuse", images, prefix, prefix_mask), prefix_mask)
    decoded = call("decode", batch["target_ids"][:, :-1], *memory)
    np.testing.assert_allclose(outputs["prefix"], decoded, rtol=1e-3, atol=1e-4)


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


def test_itm_rows_and_mask(plain, batch):
    rows = plain._fused_rows(itm_key(), similarities(), batch)
    images, texts = (np.asarray(rows[n][: 3 * SIZE]).reshape(3, SIZE) for n in ("image", "text"))
    mask = np.asarray(rows["itm_mask"]).reshape(3, SIZE)
    np.testing.assert_array_equal(mask, np.tile(batch["valid"], (3, 1)))
    np.testing.assert_array_equal(images[[0, 2]], np.tile(np.arange(SIZE), (2, 1)))
    np.testing.assert_array_equal(texts[[0, 1]], np.tile(np.arange(SIZE), (2, 1)))
    for image, text in ((images[1], texts[1]), (images[2], texts[2])):
        image, text = image[batch["valid"]], text[batch["valid"]]
        assert (batch["image_id"][image] != batch["image_id"][text]).all()
        assert batch["valid"][image].all()
        assert batch["valid"][text].all()
    own = np.arange(SIZE)
    np.testing.assert_array_equal(rows["image"][3 * SIZE :], np.concatenate([own, own]))
    np.testing.assert_array_equal(rows["text"][3 * SIZE :], np.concatenate([own + 8, own + 16]))


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.5, [0, 2, 4, 6]), (0.375, [0, 2, 5]), (0.01, [0]), (1.0, range(8))]
)
def test_itm_fraction_keeps_evenly_spaced_pairs(build, plain, batch, fraction, kept):
    config = shrunk()
    config.objectives.itm.fraction = fraction
    every = plain._fused_rows(itm_key(), similarities(), batch)
    some = build(config)._fused_rows(itm_key(), similarities(), batch)
    kept = np.array(kept)
    assert some["itm"] == 3 * len(kept)
    for name in ("image", "text", "itm_mask"):
        expected = np.asarray(every[name][: 3 * SIZE]).reshape(3, SIZE)[:, kept]
        np.testing.assert_array_equal(some[name][: 3 * len(kept)], expected.reshape(-1))
    for name in ("image", "text"):
        np.testing.assert_array_equal(some[name][3 * len(kept) :], every[name][3 * SIZE :])
    assert fraction != 0.5 or not np.asarray(some["itm_mask"]).all()  # row 6 is invalid


def test_fractions_of_mlm_and_prefix_are_the_losses_of_those_rows(build, params, batch, plain):
    config = shrunk()
    config.objectives.mlm.fraction = config.objectives.prefix.fraction = 0.5
    config.objectives.mlm.rate = 1.0  # corruption is drawn by place: let every token be drawn
    half = build(config)
    kept = np.arange(0, SIZE, 2)
    texts = half._texts(RNG, batch)
    np.testing.assert_array_equal(texts.ids[:SIZE], batch["text_ids"])
    np.testing.assert_array_equal(texts.ids[-4:], batch["prefix_ids"][kept])
    np.testing.assert_array_equal(texts.targets, batch["target_ids"][kept])
    drawn = np.where(texts.label_mask, texts.labels, batch["text_ids"][kept])
    np.testing.assert_array_equal(drawn, batch["text_ids"][kept])
    rows = half._fused_rows(None, None, batch)
    np.testing.assert_array_equal(rows["image"], np.tile(kept, 2))
    np.testing.assert_array_equal(rows["text"], SIZE + np.arange(8))

    def prefix_loss(task: Pretrain, rows: np.ndarray) -> float:
        chosen = jax.tree.map(lambda x: jnp.asarray(x[rows]), batch)
        _, _, metrics = jax.jit(task.loss)(params, None, None, chosen, RNG, jnp.int32(0))
        return float(metrics["loss_prefix"])

    every = prefix_loss(half, np.arange(SIZE))
    np.testing.assert_allclose(every, prefix_loss(plain, kept), rtol=1e-4)
    assert abs(every - prefix_loss(plain, kept + 1)) > 1e-3


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
    total, grads = compiled(gradient(task))(params)
    (expected, _), expected_grads = plain_gradient(batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
