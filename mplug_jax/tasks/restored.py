"""A trained model taken up for use: its parameters and tokenizer, and none of its training data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.data.files import joined, place
from mplug_jax.data.tokenizers import SENTENCEPIECE_FILE
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import init_params
from mplug_jax.training.checkpoint import CheckpointError, load_params
from mplug_jax.training.initialise import Plan
from mplug_jax.training.sharding import state_shardings

CLASSIFIER = "^classifier/"


class Restored(NamedTuple):
    """Parameters of a checkpoint.

    Attributes:
      params: unboxed, placed over the mesh; those of ``plan.fresh`` are 0.
      step: of the run, 0 where the folder has no number.
      plan: what was done to fit them to the model.
    """

    params: Any
    step: int
    plan: Plan


def restore(folder: Path, model_config: ModelConfig, mesh: Mesh) -> Restored:
    """The parameters of a checkpoint's folder (``find_checkpoint``), fitted to a model.

    Position embeddings are resampled; a classifier may be missing or left over.

    Raises:
      CheckpointError: any other difference.
    """
    boxed = jax.eval_shape(lambda rng: init_params(model_config, rng), jax.random.key(0))
    abstract = nn.meta.unbox(boxed)
    # Nothing is left at its initial value, and to compile that takes longer than to load a model.
    blank = jax.tree.map(_zeros, abstract, state_shardings(abstract, boxed, mesh))
    params, _, plan = load_params(folder, blank, model_config.vision.grid, (CLASSIFIER,))
    if plan.grown:
        raise CheckpointError(
            f"The model has {model_config.text.vocab_size} tokens, more than {folder} has been "
            f"trained with ({', '.join(plan.grown)}): use the config and the tokenizer of its run."
        )
    return Restored(params, checkpoint_step(folder), plan)


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint's folder is named by, or 0."""
    return int(folder.name) if folder.name.isdigit() else 0


def run_folder(folder: Path) -> Path:
    """The workdir of a checkpoint's folder; the folder itself where it lies by itself."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def beside(folder: Path, name: str) -> Path | None:
    """The file of that name that belongs to a checkpoint's folder, or None."""
    for parent in (folder.parent.parent, folder.parent, folder):
        if (parent / name).is_file():
            return parent / name
    return None


def for_use(config: ConfigDict, folder: Path, tokenizer: str = "") -> ConfigDict:
    """The config without training data, and with the tokenizer of a checkpoint.

    Args:
      folder: of the checkpoint; its own tokenizer file is taken before one that the config names,
        since its parameters were trained with that.
      tokenizer: a file that is to be taken instead.

    Raises:
      CheckpointError: there is no tokenizer file.
    """
    settings = config.data.tokenizer
    named = joined(settings.path, config.data.root) if settings.path else None
    name = Path(settings.path or SENTENCEPIECE_FILE).name
    file = place(tokenizer) if tokenizer else beside(folder, name) or named
    if file is None or not file.is_file():
        looked = tokenizer or " nor ".join(
            map(str, filter(None, (run_folder(folder) / name, named)))
        )
        raise CheckpointError(
            f"There is no tokenizer file {looked}: copy the one that the model was trained with to "
            f"{run_folder(folder) / name}."
        )
    whole = file.absolute() if isinstance(file, Path) else file
    used = config.copy_and_resolve_references()
    with used.unlocked():
        used.data.train = ()
        used.data.cached_variants = 0
        used.data.tokenizer.update({"path": str(whole), "vocab_size": 0})
    return used


def lacks_classifier(plan: Plan) -> bool:
    """Whether the checkpoint has no classifier of the model's shape."""
    return any(re.search(CLASSIFIER, name) for name in plan.fresh)


def _zeros(leaf: Any, sharding: Any) -> jax.Array:
    zeros = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: zeros[index])
