"""The task of pretraining.py, its parameters and a batch, made once for all files."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import pytest
from ml_collections import ConfigDict

from mplug_jax.data.pipeline import train_iterator
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.validation import validate
from tests.tasks.pretraining import INVALID, SIZE, shrunk


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("tokenizer"))

    def build(config: ConfigDict) -> Pretrain:
        validate(config)
        return Pretrain(config, workdir)

    return build


@pytest.fixture(scope="session")
def plain(build) -> Pretrain:
    return build(shrunk())


@pytest.fixture(scope="session")
def params(plain):
    return nn.meta.unbox(jax.jit(plain.init_params)(jax.random.key(0)))


@pytest.fixture(scope="session")
def batch(plain):
    rows = next(
        train_iterator(plain.sources, plain.make_example, seed=1, batch_size=SIZE, threads=0)
    )
    rows["valid"][INVALID] = False
    rows["image_id"][1] = rows["image_id"][0]  # two captions of one picture
    return rows


@pytest.fixture(scope="session")
def call(plain, params):
    """A model method, compiled, by name."""
    methods: dict[str, Any] = {}

    def call(name: str, *args: Any, weights: Any = params) -> Any:
        if name not in methods:
            methods[name] = jax.jit(
                lambda weights, *args: plain.setup.model.apply(
                    {"params": weights}, *args, method=name
                )
            )
        return methods[name](weights, *args)

    return call
