"""The loop end to end, on the real quickstart config made small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from mplug_jax import train as train_lib
from mplug_jax.config import ConfigError, retrieval_eval
from mplug_jax.data.records import SourceError
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.train import NonFiniteError, train
from mplug_jax.training.checkpoint import CheckpointError
from mplug_jax.training.metrics import read_metrics
from mplug_jax.training.sharding import MeshError

STEPS = 6
RATES = ("train/images_per_second", "train/model_flops_per_second", "train/steps_per_second")


def shrunk() -> ConfigDict:
    """The quickstart with dropout, teacher and queue on, small enough to compile in seconds."""
    config = quickstart.get_config()
    config.update({"total_steps": STEPS, "batch_size": 8})
    config.update({"log_every": 1, "eval_every": 3, "checkpoint_every": 3})
    config.model.vision.update({"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64})
    config.model.vision.attention_dropout = 0.1
    config.model.text.update({"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"dropout": 0.1, "attention_dropout": 0.1})
    config.model.update({"embed_dim": 16, "scan_unroll": 1})
    config.objectives.update({"momentum": 0.9, "alpha_ramp_steps": 4})
    config.objectives.itc.update({"alpha": 0.4, "queue_size": 24})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.4
    config.optimizer.warmup_steps = 2
    config.data.train = ({**config.data.train[0], "size": 64},)
    config.data.tokenizer.vocab_size = 128
    config.evals.retrieval.update({"limit": 16, "rerank": 4})
    config.evals.caption.update({"limit": 8, "max_length": 6})
    return config

def test_x(tmp_path):
    t=time.time(); train(shrunk(), str(tmp_path)); print("T", time.time()-t)
    t=time.time(); train(shrunk(), str(tmp_path/"b")); print("T", time.time()-t)
    os.system(f"find {tmp_path}; cat {tmp_path}/results.json; head -3 {tmp_path}/metrics.jsonl")
