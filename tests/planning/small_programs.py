"""Pre-training large enough for its activations to count, small enough to compile in a minute."""

from __future__ import annotations

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import pretrain_base
from mplug_jax.planning.program import Program, build_program
from mplug_jax.training.sharding import make_mesh


def small_config(**changes: Any) -> ConfigDict:
    """pretrain_base in float32 without remat, with four layers of width 128 at 64 px."""
    config = pretrain_base.get_config()
    config.batch_size = 16
    config.model.update({"dtype": "float32", "remat": "none"})
    vision = {"image_size": (64, 64), "width": 128, "depth": 4, "heads": 4, "mlp_dim": 512}
    text = {"width": 128, "depth": 3, "heads": 4, "mlp_dim": 512, "vocab_size": 2000}
    config.model.vision.update(vision)
    config.model.text.update({**text, "max_positions": 64})
    config.model.fusion.update({"depth": 4, "stride": 3})
    config.model.decoder.depth = 4
    config.objectives.itc.queue_size = 1024
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def tiny_config(**changes: Any) -> ConfigDict:
    """One layer of each kind, for what does not depend on how many there are."""
    depths = {"vision": 1, "text": 1, "fusion": 1, "decoder": 1}
    tiny = {f"model.{part}.depth": depth for part, depth in depths.items()}
    return small_config(**{**tiny, "model.fusion.stride": 1, **changes})


def small_program(config: ConfigDict, shape: dict[str, int]) -> Program:
    """The program on fake devices."""
    devices = jax.devices()[: math.prod(shape.values())]
    return build_program(config, make_mesh(shape, devices))
