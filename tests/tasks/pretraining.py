"""A pre-training task that compiles in seconds, for the tests of its loss and of its rows."""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import quickstart
from tests.small_runs import few_texts

SIZE = 8
RNG = jax.random.key(5)
INVALID = np.array([3, 6])


def shrunk() -> ConfigDict:
    """The quickstart, small enough to compile in seconds: no dropout, teacher or queue."""
    config = quickstart.get_config()
    config.batch_size = SIZE
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.decoder.depth = 1
    config.model.update({"embed_dim": 16, "scan_unroll": 1})
    config.objectives.itm.fraction = 1.0
    config.data.train = ({**config.data.train[0], "size": 64},)
    few_texts(config, 128)
    return config
