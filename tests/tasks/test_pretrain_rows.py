"""The rows that pre-training fuses: those of the separate passes, and the fractions of them."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mplug_jax.models.stacking import join_parts
from mplug_jax.objectives.itc import ITCOutput
from mplug_jax.objectives.itm import sample_negatives
from mplug_jax.tasks.pretrain import Pretrain, Texts
from tests.tasks.pretraining import RNG, SIZE, shrunk

pytestmark = pytest.mark.slow


def itm_key() -> jax.Array:
    return jax.random.fold_in(RNG, zlib.crc32(b"itm") & 0x7FFFFFFF)


def similarities() -> ITCOutput:
    sims = np.random.default_rng(4).normal(size=(2, SIZE, SIZE)).astype(np.float32)
    return ITCOutput(jnp.zeros(()), jnp.zeros(()), jnp.asarray(sims[0]), jnp.asarray(sims[1]))


def pooled(pools: int) -> ConfigDict:
    config = shrunk()
    config.objectives.itm.pool = SIZE // pools
    return config


@pytest.mark.parametrize("pools", [1, 2])
def test_fused_rows_are_the_separate_passes(build, params, batch, call, pools):
    task = build(pooled(pools))
    ids = np.concatenate([batch["text_ids"], batch["text_ids"], batch["prefix_ids"]])
    ids[SIZE : SIZE + 2, 1] = task.setup.tokenizer.mask_id  # stands for the masked texts
    mask = np.concatenate([batch["text_mask"], batch["text_mask"], batch["prefix_mask"]])

    def together(params, ids, mask, batch):
        ids, mask = (join_parts(np.split(x, 3), pools) for x in (ids, mask))
        texts = Texts(ids, mask, None, None, batch["target_ids"], batch["target_mask"])
        encoded = task._encode(params, batch["image"], texts, None)
        rows = task._fused_rows(itm_key(), similarities(), batch)
        return task._fused_outputs(params, encoded, texts, rows, None)

    outputs = jax.jit(lambda params, batch: together(params, ids, mask, batch))(params, batch)

    sims = similarities()
    negatives = sample_negatives(
        itm_key(), sims.image_to_text, sims.text_to_image, batch["image_id"], batch["valid"], pools
    )
    images = np.asarray(call("encode_image", batch["image"]))
    texts, masked, prefix = np.split(np.asarray(call("encode_text", ids, mask)), 3)
    own_mask, _, prefix_mask = np.split(mask, 3)

    def match(image: Any, text: Any, text_mask: Any) -> np.ndarray:
        return np.asarray(call("match", call("fuse", image, text, text_mask)[1]))

    other_images = images[negatives.image_for_text]
    chosen = np.asarray(negatives.text_for_image)
    by_pool = np.asarray(outputs["itm"]).reshape(pools, 3, -1, 2)
    positives, wrong_image, wrong_text = by_pool.swapaxes(0, 1).reshape(3, SIZE, 2)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(positives, match(images, texts, own_mask), **close)
    for got, want, ok in (
        (wrong_image, match(other_images, texts, own_mask), negatives.image_ok),
        (wrong_text, match(images, texts[chosen], own_mask[chosen]), negatives.text_ok),
    ):
        assert ok.any()
        np.testing.assert_allclose(got[ok], want[ok], **close)
    assert np.abs(positives - wrong_image).max() > 1e-2
    assert np.abs(positives - wrong_text).max() > 1e-2

    mlm = call("mlm_logits", call("fuse", images, masked, own_mask)[1])
    np.testing.assert_allclose(outputs["mlm"], mlm, rtol=1e-3, atol=1e-4)
    memory = call("memory", *call("fuse", images, prefix, prefix_mask), prefix_mask)
    decoded = call("decode", batch["target_ids"][:, :-1], *memory)
    np.testing.assert_allclose(outputs["prefix"], decoded, rtol=1e-3, atol=1e-4)


def test_itm_rows_and_mask(plain, batch):
    rows = plain._fused_rows(itm_key(), similarities(), batch)
    images, texts = (np.asarray(rows[n][0, : 3 * SIZE]).reshape(3, SIZE) for n in ("image", "text"))
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
    np.testing.assert_array_equal(rows["image"][0, 3 * SIZE :], np.concatenate([own, own]))
    np.testing.assert_array_equal(rows["text"][0, 3 * SIZE :], np.concatenate([own + 8, own + 16]))


def test_negatives_grow_from_random_ones_to_the_most_similar(plain, batch):
    """Similarities so peaked that hard negatives are all of one column: of random ones few are."""
    sims = jnp.zeros((SIZE, SIZE)).at[:, 1].set(50.0)
    itc = ITCOutput(jnp.zeros(()), jnp.zeros(()), sims, sims)
    valid = np.flatnonzero(batch["valid"] & (batch["image_id"] != batch["image_id"][1]))

    def most_similar(hardness: float) -> float:
        draws = [
            np.asarray(plain._fused_rows(jax.random.key(i), itc, batch, hardness)["text"])[
                0, 2 * SIZE + valid
            ]
            for i in range(20)
        ]
        return float(np.mean(np.stack(draws) == 1))

    assert most_similar(1.0) == 1.0
    assert most_similar(0.0) < 0.5


def test_a_fraction_is_kept_of_each_pool(build, batch):
    config = pooled(2)
    config.objectives.itm.fraction = config.objectives.prefix.fraction = 0.5
    rows = build(config)._fused_rows(itm_key(), similarities(), batch)
    images, texts = np.asarray(rows["image"]), np.asarray(rows["text"])
    assert (rows["itm"], rows["mlm"], rows["prefix"]) == (12, 8, 4)
    for pool in (0, 1):  # of four rows: kept are the first and the third
        np.testing.assert_array_equal(images[pool, [0, 1, 4, 5]], [0, 2, 0, 2])
        np.testing.assert_array_equal(texts[pool, :4], [0, 2, 0, 2])
        np.testing.assert_array_equal(images[pool, 6:], [0, 1, 2, 3, 0, 2])
        np.testing.assert_array_equal(texts[pool, 6:], 4 + np.arange(6))
        own = slice(4 * pool, 4 * pool + 4)
        ids, valid = batch["image_id"][own], batch["valid"][own]
        mask = np.asarray(rows["itm_mask"]).reshape(2, 3, 2)[pool]
        negatives = (images[pool, 2:4], texts[pool, 4:6])
        for chosen, drawn in zip(negatives, mask[1:], strict=True):
            assert (ids[chosen] != ids[[0, 2]])[drawn].all() and valid[chosen][drawn].all()
        np.testing.assert_array_equal(mask[0], valid[[0, 2]])
    labels = np.asarray(rows["itm_labels"]).reshape(2, 3, 2)
    assert (labels[:, 0] == 1).all() and not labels[:, 1:].any()


def test_pools_of_two_are_pairs_trained_alone(build, params, batch):
    """In a pool of two rows the negative is the other, whatever is drawn."""

    def losses(pools: int, rows: np.ndarray) -> list[dict[str, Any]]:
        config = pooled(pools)
        config.objectives.mlm.weight = 0.0
        task = build(config)
        loss = jax.jit(lambda batch: task.loss(params, None, None, batch, RNG, jnp.int32(0))[2])
        return [loss({name: x[own] for name, x in batch.items()}) for own in rows]

    valid = batch["valid"].reshape(-1, 2)
    same = (batch["image_id"].reshape(-1, 2) == batch["image_id"].reshape(-1, 2)[:, :1]).all(1)
    # Each valid row and, where both are valid and of two pictures, two negatives for each.
    counts = valid.sum(1) + 4 * (valid.all(1) & ~same)
    assert sorted(set(counts.tolist())) == [1, 2, 6]
    (whole,) = losses(SIZE // 2, np.arange(SIZE)[None])
    alone = losses(1, np.arange(SIZE).reshape(-1, 2))
    words = (batch["target_mask"][:, 1:] & batch["valid"][:, None]).reshape(SIZE // 2, -1).sum(1)
    for name, number in (("loss_itm", counts), ("loss_prefix", words)):
        want = np.average([each[name] for each in alone], weights=number)
        np.testing.assert_allclose(whole[name], want, rtol=1e-5)
    # ITC contrasts all rows whatever the pool.
    (one_pool,) = losses(1, np.arange(SIZE)[None])
    np.testing.assert_allclose(whole["loss_itc"], one_pool["loss_itc"], rtol=1e-6)
    assert abs(float(whole["loss_itm"]) - float(one_pool["loss_itm"])) > 1e-4


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
        expected = np.asarray(every[name]).reshape(-1)[: 3 * SIZE].reshape(3, SIZE)[:, kept]
        got = np.asarray(some[name]).reshape(-1)[: 3 * len(kept)]
        np.testing.assert_array_equal(got, expected.reshape(-1))
    for name in ("image", "text"):
        np.testing.assert_array_equal(some[name][0, 3 * len(kept) :], every[name][0, 3 * SIZE :])
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
    np.testing.assert_array_equal(rows["image"][0], np.tile(kept, 2))
    np.testing.assert_array_equal(rows["text"][0], SIZE + np.arange(8))

    def prefix_loss(task: Pretrain, rows: np.ndarray) -> float:
        chosen = jax.tree.map(lambda x: jnp.asarray(x[rows]), batch)
        _, _, metrics = jax.jit(task.loss)(params, None, None, chosen, RNG, jnp.int32(0))
        return float(metrics["loss_prefix"])

    every = prefix_loss(half, np.arange(SIZE))
    np.testing.assert_allclose(every, prefix_loss(plain, kept), rtol=1e-4)
    assert abs(every - prefix_loss(plain, kept + 1)) > 1e-3
