"""What every task starts from: the training data, the tokenizer and the model of a config."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from mplug_jax import config as config_lib
from mplug_jax.data.records import Source
from mplug_jax.data.sources import build_mixture
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import MPlug
from mplug_jax.tasks.features import with_features
from mplug_jax.tasks.tokenizer import make_tokenizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """Built once a run.

    Attributes:
      config: the run's settings.
      sources: (training source, weight) pairs; none of a config that names no training data.
      tokenizer: text to ids and back.
      model_config, model: shapes, and the module.
      transform: what happens to a training picture.
    """

    config: ConfigDict
    sources: list[tuple[Source, float]]
    tokenizer: Tokenizer
    model_config: ModelConfig
    model: MPlug
    transform: ImageTransform

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the model takes."""
        return self.model_config.vision.image_size

    def without_remat(self) -> Setup:
        """The same on a model that keeps its activations."""
        return dataclasses.replace(self, model=MPlug(self.model_config.replace(remat="none")))


def prepare(config: ConfigDict, workdir: str) -> Setup:
    """Builds the parts, and what they keep in the workdir.

    A config without training data is one for using a model: its tokenizer must exist.

    Raises:
      ConfigError, SourceError, CheckpointError: a mistake in the config or the data.
    """
    data = config.data
    sources = build_mixture(data.train, data.root, config.seed, data.max_bad_fraction)
    tokenizer = make_tokenizer(config, workdir, sources)
    model_config = config_lib.model_config(config, _vocabulary(config, tokenizer))
    model = MPlug(model_config)
    if data.cached_variants:
        sources = with_features(sources, config, model, workdir)
    transform = ImageTransform(
        model_config.vision.image_size,
        train=True,
        crop_scale=None if data.crop_scale is None else tuple(data.crop_scale),
        flip=data.flip,
        randaugment=data.randaugment,
        decoder=data.decoder,
    )
    return Setup(config, sources, tokenizer, model_config, model, transform)


def _vocabulary(config: ConfigDict, tokenizer: Tokenizer) -> int:
    """The tokenizer's tokens, and the coordinates and their prefix where those are appended."""
    settings = config.finetune.grounding
    appended = config.task == "grounding" and settings.appended
    return tokenizer.vocab_size + (settings.bins + 1 if appended else 0)
