"""Checkpoints of models that are small enough to compile in seconds, for those who use one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from mplug_jax.config import caption_eval, defaults, retrieval_eval, save_config
from mplug_jax.data.tokenizers import SENTENCEPIECE_FILE, train_sentencepiece
from mplug_jax.models.mplug import init_params
from mplug_jax.tasks.restored import for_use
from mplug_jax.tasks.setup import prepare
from mplug_jax.training.checkpoint import save_params

TEXTS = (
    "a red square above a blue circle",
    "a green triangle left of a yellow star",
    "two small circles and a large star",
    "what colour is the square",
    "how many stars are there",
)
VOCABULARY = 64


def small_config(task: str = "pretrain") -> ConfigDict:
    """No dropout, teacher or queue; scenes, or photos below ``data.root``."""
    config = defaults("tiny")
    config.update({"task": task, "total_steps": 2, "batch_size": 8, "log_every": 1})
    config.update({"eval_every": 0, "checkpoint_every": 1})
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.vocab_size = 0
    config.model.fusion.update({"depth": 2, "stride": 1})
    config.model.decoder.depth = 1
    config.model.embed_dim = 16
    config.objectives.momentum = 0.0
    config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
    config.finetune.grounding.update({"bins": 17, "appended": True})
    config.data.update({"text_length": 32, "target_length": 8, "crop_scale": None})
    config.data.update({"flip": False, "randaugment": False})
    config.data.tokenizer.update({"kind": "sentencepiece", "path": "", "vocab_size": VOCABULARY})
    config.data.train = ({"kind": "scenes", "level": "easy", "split": "train", "size": 16},)
    held_out = {"kind": "scenes", "level": "easy", "split": "val", "size": 8}
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(held_out, limit=8, rerank=4)
        config.evals.caption = caption_eval(held_out, limit=8, max_length=6)
    return config


def contrast_alone(config: ConfigDict) -> ConfigDict:
    """``config`` with ITC alone: compiled in a few seconds, for what happens around the program."""
    for name in ("itm", "mlm", "prefix"):
        config.objectives[name].weight = 0.0
    with config.evals.unlocked():
        del config.evals.caption
    return config


def few_texts(config: ConfigDict, vocabulary: int) -> None:
    """A small tokenizer from a tenth of the scenes, most of whose time goes into drawing them."""
    texts = {**config.data.tokenizer.texts[0], "size": 100}
    config.data.tokenizer.update({"vocab_size": vocabulary, "texts": (texts,)})


def random_checkpoint(workdir: Path, config: ConfigDict, seed: int = 0) -> Path:
    """A workdir with a tokenizer, config.json and parameters drawn by NumPy."""
    workdir.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(iter(TEXTS), workdir / SENTENCEPIECE_FILE, VOCABULARY)
    setup = prepare(for_use(config, workdir), str(workdir))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        # Large enough that pictures and texts make a difference.
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(rng.normal(mean, 0.2, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda key: init_params(setup.model_config, key), jax.random.key(0))
    save_params(workdir, jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes)))
    save_config(config, workdir)
    return workdir
