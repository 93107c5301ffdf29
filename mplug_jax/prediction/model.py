"""The model of a checkpoint, and what it has learnt to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mplug_jax import saved_config as saved_config_lib
from mplug_jax.config import ConfigError
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.tasks.forward import Forward
from mplug_jax.tasks.restored import for_use, restore, run_folder
from mplug_jax.tasks.setup import Setup, prepare
from mplug_jax.training.checkpoint import CheckpointError, find_checkpoint, saved_config
from mplug_jax.training.sharding import data_mesh

COMMANDS = ("caption", "vqa", "match", "retrieve", "ground")


class PredictionError(ValueError):
    """Something asked of a model that it cannot do, or about files that are not there."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its parameters on one device.

    Attributes:
      setup: the model, its tokenizer and its run's settings.
      params: its parameters.
    """

    setup: Setup
    params: Any

    @property
    def special(self) -> dict[str, int]:
        """The ids that decoding asks for."""
        t = self.setup.tokenizer
        return {"cls_id": t.cls_id, "sep_id": t.sep_id, "pad_id": t.pad_id}

    def forward(self, params: Any) -> Forward:
        """The model with these parameters, without dropout."""
        return Forward(self.setup.model, params)

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 ``[h, w, 3]`` resized to what the model takes, ``[H, W, 3]``."""
        return ImageTransform(self.setup.image_size, train=False)(pixels, None)

    def texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and masks ``[N, L]`` of texts, as the model was trained to read them.

        Raises:
          PredictionError: a text without a word.
        """
        tokenizer, length = self.setup.tokenizer, self.setup.config.data.text_length
        for text in texts:
            if not any(tokenizer.words(text)):
                raise PredictionError(f"The text {text!r} has no words.")
        encoded = [tokenizer.encode(text, length) for text in texts]
        ids, mask = (np.stack(part) for part in zip(*encoded, strict=True))
        return ids, mask

    def check_room(self, prompt: int, max_length: int) -> None:
        """Raises PredictionError unless a text of ``max_length`` tokens can follow the prompt."""
        positions = self.setup.model_config.text.max_positions
        if prompt + max_length - 1 > positions:
            raise PredictionError(
                f"A prompt of {prompt} tokens and --max_length={max_length} exceed the {positions} "
                "positions of the model: give less of either."
            )


def load_model(checkpoint: str, command: str, tokenizer: str = "") -> Model:
    """The model that a checkpoint's config.json describes.

    Args:
      checkpoint: a workdir, one of its checkpoints, or what ``convert`` wrote.
      command: what it is for, one of ``COMMANDS``.
      tokenizer: a file to take in place of the run's own.

    Raises:
      CheckpointError: no checkpoint, config.json or tokenizer, or one that does not fit.
      PredictionError: the model has not learnt it.
    """
    folder = find_checkpoint(checkpoint, "--checkpoint")
    settings = saved_config(folder)
    if settings is None:
        raise CheckpointError(
            f"{run_folder(folder)} has no config.json, which says what model this is: copy the one "
            "of the run there."
        )
    try:
        config = saved_config_lib.from_settings(settings)
    except ConfigError as error:
        raise CheckpointError(f"The config.json of {folder} cannot be used: {error}.") from error
    _check_learnt(config, command, run_folder(folder))
    setup = prepare(for_use(config, folder, tokenizer), "")
    mesh = data_mesh(jax.local_devices()[:1])
    return Model(setup, restore(folder, setup.model_config, mesh).params)


def learnt(config: ConfigDict) -> tuple[str, ...]:
    """The commands that a run of this config trains a model for."""
    match config.task:
        case "pretrain" | "retrieval":
            commands = ("caption", "vqa") if config.objectives.prefix.weight else ()
            return commands + (("match", "retrieve") if config.objectives.itc.weight else ())
        case "caption" | "scst":
            return ("caption",)
        case "vqa":
            return ("vqa",)
        case "grounding":
            return ("ground",)
    return ()


def _check_learnt(config: ConfigDict, command: str, run: Path) -> None:
    commands, task = learnt(config), config.task
    if config.model.frames > 1:
        raise PredictionError(
            f"The model of {run} takes clips of {config.model.frames} frames; predict reads "
            "pictures. Evaluate it with python -m mplug_jax.evaluate."
        )
    if command in commands:
        return
    can = f"it can {', '.join(commands)}" if commands else "predict has no command for that"
    why = "has no coordinate tokens" if command == "ground" else f"has not learnt to {command}"
    raise PredictionError(
        f"The model of {run} {why}: its run was of config.task={task!r}, so {can}. Give the "
        f"--checkpoint of a run that trains it, such as {_EXAMPLES[command]}."
    )


_EXAMPLES = {
    "caption": "config.task='caption'",
    "vqa": "config.task='vqa'",
    "match": "config.task='retrieval'",
    "retrieve": "config.task='retrieval'",
    "ground": "config.task='grounding'",
}


def one(array: np.ndarray) -> jax.Array:
    """A batch of one."""
    return jnp.asarray(array)[None]
