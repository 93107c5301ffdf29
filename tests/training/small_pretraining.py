"""Pre-training of a model that compiles in seconds, on any mesh: all objectives, teacher, queue."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from configs.quickstart import get_config
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.training.optimizer import make_optimizer
from mplug_jax.training.sharding import (
    abstract_batch,
    batch_sharding,
    on_mesh,
    place_local_batch,
    replicated,
    state_shardings,
)
from mplug_jax.training.state import create_state
from mplug_jax.training.step import first_momentum_params, make_train_step


def write_vocabulary(folder: Path) -> str:
    """The path of a WordPiece vocabulary of single letters."""
    letters = [prefix + c for c in string.ascii_lowercase for prefix in ("", "##")]
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return str(path)


def small_config(vocabulary: str) -> ConfigDict:
    config = get_config()
    config.batch_size = 16
    config.model.scan_unroll = 1
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.fusion.update({"depth": 1, "stride": 1})
    config.model.decoder.depth = 1
    config.model.embed_dim = 16
    config.objectives.momentum = 0.9
    config.objectives.alpha_ramp_steps = 0
    config.objectives.itm.fraction = 1.0
    config.objectives.itc.update({"alpha": 0.4, "queue_size": 32})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.4
    # Adam divides by the gradient's own size: the large eps keeps rounding in gradients that are
    # zero but for it (biases of keys) from turning into full steps.
    config.optimizer.update({"lr": 1e-2, "warmup_steps": 0, "eps": 1e-3})
    config.data.tokenizer.update({"kind": "wordpiece", "path": vocabulary, "vocab_size": 0})
    config.data.train = ({"kind": "scenes", "level": "easy", "split": "train", "cache": False},)
    return config


def pretrain_batch(task: Pretrain, size: int, first: int = 0) -> dict[str, np.ndarray]:
    """``size`` examples from the place ``first`` on; row 5 is invalid, 2 and 9 share a picture."""
    rng = np.random.default_rng(first)
    source = task.sources[0][0]
    examples = [task.make_example(source[first + i], rng) for i in range(size)]
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
    batch["image_id"][9] = batch["image_id"][2]
    return batch | {"valid": np.arange(size) != 5, "bad": np.zeros(size, np.int32)}


def pretrain_start(task: Pretrain) -> tuple[Any, Any, Any]:
    """(optimizer, boxed shapes, state at step 0) of a task, on one device."""
    config = task.config
    rng = jax.random.key(config.seed)
    boxed = jax.eval_shape(task.init_params, rng)
    optimizer = make_optimizer(nn.meta.unbox(boxed), config.optimizer, config.total_steps)

    def init() -> Any:
        params = nn.meta.unbox(task.init_params(rng))
        teacher = first_momentum_params(params, config.optimizer)
        return create_state(params, optimizer, task.init_extra(rng), config.seed, teacher)

    return optimizer, boxed, jax.jit(init)()


def pretrain_step(
    task: Pretrain, optimizer: Any, boxed: Any, state: Any, mesh: Any, *, accumulate: int = 1
) -> tuple[Any, Any]:
    """(compiled step, shardings of the state) on a mesh."""
    shardings = state_shardings(state, boxed, mesh)
    step = make_train_step(
        task.loss,
        optimizer,
        task.config.optimizer.to_dict(),
        total_steps=task.config.total_steps,
        accumulate=accumulate,
        momentum=task.config.objectives.momentum,
        momentum_warmup=False,
    )
    jitted = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    example = {k: v[0] for k, v in pretrain_batch(task, 16).items()}
    with on_mesh(mesh):
        lowered = jitted.lower(state, abstract_batch(example, task.config.batch_size, mesh))
        return lowered.compile(), shardings


def pretrain_update(
    task: Pretrain,
    optimizer: Any,
    boxed: Any,
    state: Any,
    mesh: Any,
    batches: list[dict[str, np.ndarray]],
    *,
    accumulate: int = 1,
) -> tuple[Any, list[dict[str, float]]]:
    """(state on the host, metrics of each step) after a step with each of the batches."""
    compiled, shardings = pretrain_step(task, optimizer, boxed, state, mesh, accumulate=accumulate)
    metrics = []
    state = jax.device_put(state, shardings)
    for batch in batches:
        state, scalars = compiled(state, place_local_batch(batch, mesh))
        metrics.append(jax.tree.map(float, scalars))
    return jax.tree.map(np.asarray, state), metrics
