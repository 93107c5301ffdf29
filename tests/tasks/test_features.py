"""A frozen image encoder sees every training picture once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from mplug_jax.config import ConfigError
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.data.records import BadSample
from mplug_jax.models.mplug import init_params
from mplug_jax.tasks.features import with_features
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.validation import validate
from tests.small_runs import few_texts

pytestmark = pytest.mark.slow

FROZEN = ("^visual_encoder/", {"freeze": True})


def frozen(start: Path) -> ConfigDict:
    config = quickstart.get_config()
    config.batch_size = 8
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.decoder.depth = 1
    config.model.update({"embed_dim": 16, "scan_unroll": 1})
    config.data.train = ({**config.data.train[0], "size": 12},)
    few_texts(config, 100)
    config.optimizer.rules += (FROZEN,)
    config.init_from = str(start)
    config.data.cached_variants = 2
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Any]:
    """A checkpoint to start from, and its parameters."""
    folder = tmp_path_factory.mktemp("start")
    config = frozen(folder)
    config.data.cached_variants = 0
    config.init_from = None
    task = Pretrain(config, str(folder))
    params = nn.meta.unbox(init_params(task.model_config, jax.random.key(3)))
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "checkpoints" / "1" / "state").absolute(), {"params": params})
    return folder, params


def test_the_features_are_the_encoders_tokens_of_the_picture_and_its_mirror_image(start, tmp_path):
    folder, params = start
    config = frozen(folder)
    validate(config)
    task = Pretrain(config, str(tmp_path))
    source = task.sources[0][0]
    record = source[5]
    pictures = np.stack([record["image"], record["image"][:, ::-1]])
    tokens = task.setup.model.apply(
        {"params": params}, jnp.asarray(pictures), method=lambda m, x: m.visual_encoder(x)
    )
    np.testing.assert_allclose(record["features"], tokens, rtol=2e-3, atol=2e-3)
    assert np.abs(record["features"][0] - record["features"][1]).max() > 1e-2

    # A batch holds either variant, and the model makes of it what it makes of the picture.
    batch = next(train_iterator(task.sources, task.make_example, seed=0, batch_size=8))
    assert batch["image"].shape == (8, *tokens.shape[1:])
    whole, cached = (
        task.setup.model.apply({"params": params}, jnp.asarray(x), method="encode_image")
        for x in (pictures, np.asarray(record["features"]))
    )
    np.testing.assert_allclose(whole, cached, rtol=2e-3, atol=2e-3)


def test_it_encodes_once_and_again_only_for_other_weights(start, tmp_path, monkeypatch):
    folder, _ = start
    Pretrain(frozen(folder), str(tmp_path))
    (file,) = (tmp_path / "features").glob("*.npy")
    before = file.stat().st_mtime_ns
    Pretrain(frozen(folder), str(tmp_path))
    assert file.stat().st_mtime_ns == before
    config = frozen(folder)
    config.data.cached_variants = 1
    Pretrain(config, str(tmp_path))
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_picture_that_cannot_be_read_is_a_bad_sample(start, tmp_path):
    folder, _ = start
    config = frozen(folder)
    setup = Pretrain(config, str(tmp_path)).setup

    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = "/missing.jpg" if index == 1 else np.zeros((32, 32, 3), np.uint8)
            return {"id": str(index), "image": image, "image_id": index, "captions": ["a dog"]}

    ((source, weight),) = with_features([(Broken(), 2.0)], config, setup.model, str(tmp_path))
    assert weight == 2.0
    assert source[2]["features"].shape[0] == 2
    with pytest.raises(BadSample, match="1: its picture"):
        source[1]


def test_records_of_the_same_picture_share_its_features(start, tmp_path):
    folder, _ = start
    config = frozen(folder)
    setup = Pretrain(config, str(tmp_path)).setup
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    order = (0, 1, 0, 2, 1, 0)

    class Phrases:
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> dict[str, Any]:
            number = order[index]
            return {"id": str(index), "image": pictures[number], "image_id": 40 + number}

    ((source, _),) = with_features([(Phrases(), 1.0)], config, setup.model, str(tmp_path))
    assert len(source) == 6 and len(np.load(source.path)) == 3
    for index, number in enumerate(order):
        same = source[order.index(number)]["features"]
        np.testing.assert_array_equal(source[index]["features"], same)
        assert source[index]["id"] == str(index)
    assert np.abs(source[0]["features"] - source[3]["features"]).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ()}, "must be frozen: add"),
        ({"init_from": None}, "needs config.init_from"),
    ],
)
def test_mistakes(start, tmp_path, change, message):
    config = frozen(start[0])
    if "rules" in change:
        config.optimizer.rules = config.optimizer.rules[:-1]
    else:
        config.init_from = None
    with pytest.raises(ConfigError, match=message):
        Pretrain(config, str(tmp_path))
