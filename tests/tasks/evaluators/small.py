"""Models that compile in seconds, with their parameters, for the tests of the evaluators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np

from mplug_jax.config import defaults
from mplug_jax.data.records import BadSample, Record
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.models.config import ModelConfig, preset
from mplug_jax.models.mplug import MPlug, init_params
from mplug_jax.tasks.setup import Setup
from mplug_jax.training.sharding import make_mesh, replicated

LENGTH = 40
BINS = 9


def make_setup(tokenizer: Tokenizer, task: str = "pretrain", **model: Any) -> Setup:
    """A run of a task on pictures of 32 px."""
    config = defaults("tiny")
    with config.unlocked():
        config.task = task
        config.data.update({"text_length": LENGTH, "target_length": 12, "train": ({},)})
        config.finetune.grounding.update({"bins": BINS, "appended": True})
    appended = BINS + 1 if task == "grounding" else 0
    sizes = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
    shapes = preset("tiny").replace(
        vision=sizes,
        text={**sizes, "vocab_size": tokenizer.vocab_size + appended},
        fusion={"depth": 2, "stride": 1},
        decoder={"depth": 1},
        embed_dim=8,
        **model,
    )
    transform = ImageTransform((32, 32), train=False)
    return Setup(config, [], tokenizer, shapes, MPlug(shapes), transform)


class WithModel(Protocol):
    """A setup or a task."""

    model_config: ModelConfig


def random_params(setup: WithModel) -> Any:
    """Random and large, so that pictures and texts are told apart."""
    shapes = nn.meta.unbox(
        jax.eval_shape(lambda key: init_params(setup.model_config, key), jax.random.key(0))
    )
    rng = np.random.default_rng(2)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        return {"scale": 1 + 0.2 * noise, "kernel": 0.3 * noise}.get(name, 0.5 * noise)

    return jax.tree_util.tree_map_with_path(fill, shapes)


class Call:
    """A model method by name, compiled, for one example at a time."""

    def __init__(self, setup: Setup, params: Any):
        self._model, self._params, self._methods = setup.model, params, {}

    def __call__(self, name: str, *args: Any) -> np.ndarray | tuple[np.ndarray, ...]:
        if name not in self._methods:
            self._methods[name] = jax.jit(
                lambda params, *args: self._model.apply({"params": params}, *args, method=name)
            )
        return jax.tree.map(np.asarray, self._methods[name](self._params, *args))

    def memory_of(self, example: Any) -> Any:
        """What the decoder reads of an example's picture and text."""
        ids, mask = example["text_ids"][None], example["text_mask"][None]
        image = self("encode_image", example["image"][None])
        fused = self("fuse", image, self("encode_text", ids, mask), mask)
        return self("memory", *fused, mask)

    def greedy(
        self,
        memory: Any,
        start: Sequence[int],
        length: int,
        tokenizer: Tokenizer,
        allowed: np.ndarray | None = None,
    ) -> list[int]:
        """The likeliest tokens after ``start``, the whole text read anew for each."""
        ids = np.full((1, len(start) + length), tokenizer.pad_id, np.int32)
        ids[0, : len(start)] = start
        tokens: list[int] = []
        while len(tokens) < length and tokenizer.sep_id not in tokens:
            logits = np.array(self("decode", ids, *memory))[0, len(start) + len(tokens) - 1]
            logits[[tokenizer.cls_id, tokenizer.pad_id]] = -np.inf
            if allowed is not None:
                logits[~allowed] = -np.inf
            tokens.append(int(logits.argmax()))
            ids[0, len(start) + len(tokens) - 1] = tokens[-1]
        return tokens


class Broken:
    """A source some records of which cannot be read."""

    def __init__(self, source: Scenes, bad: set[int]):
        self.source, self.bad = source, bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise BadSample(f"record {index} is broken")
        return self.source[index]


@functools.cache
def mesh_of(count: int) -> Any:
    return make_mesh({"data": count}, jax.devices()[:count])


def place(params: Any, mesh: Any) -> Any:
    return jax.device_put(params, replicated(mesh))
