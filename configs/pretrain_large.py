"""The paper's pre-training of mPLUG-large: ViT-L/14 at 224 px, fusion stride 6."""

import dataclasses

from ml_collections import ConfigDict

from configs import pretrain_base
from mplug_jax.models.config import preset


def get_config() -> ConfigDict:
    """pretrain_base with the large towers and their rates."""
    config = pretrain_base.get_config()
    large = preset("large")
    config.model.vision.update(dataclasses.asdict(large.vision))
    config.model.fusion.update(dataclasses.asdict(large.fusion))
    config.model.vision.image_size = (224, 224)
    config.objectives.itm.pool = 128  # official: the rows of a device
    config.optimizer.lr = 5e-5
    config.optimizer.min_lr = 2e-6
    config.optimizer.rules = ((r"^visual_encoder/", {"lr": 5e-6}), *config.optimizer.rules[1:])
    return config
