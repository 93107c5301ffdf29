"""Visual entailment (SNLI-VE) from a pre-trained checkpoint.

``configs/snli_ve.py:base`` or ``:large``. The official code has no recipe: rates, epochs and batch
are those of ALBEF's ``configs/VE.yaml``, without its distillation. ``config.data.root`` holds
``snli_ve_train.jsonl``, ``_dev``, ``_test`` and Flickr30K's pictures in ``flickr30k-images/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import HEADS, start, train_for
from mplug_jax.config import classification_eval

PAIRS = 529_527  # of train (Xie et al. 2019)


def snli_ve(split: str) -> dict[str, Any]:
    """The hypotheses of a split."""
    return {"kind": "snli_ve", "path": f"snli_ve_{split}.jsonl", "images": "flickr30k-images"}


def get_config(size: str = "base") -> ConfigDict:
    """Five epochs of 32 pairs on 8 devices."""
    config = start("snli_ve", size)
    train_for(
        config,
        epochs=5,
        items=PAIRS,
        batch=32 * 8,
        lr=2e-5,
        vision_lr=2e-5,
        warmup_units=1,
        unused=("decoder", *HEADS),
    )
    config.model.classes = 3
    config.data.train = (snli_ve("train"),)
    config.data.text_length = 40
    with config.evals.unlocked():
        for split in ("dev", "test"):
            config.evals[split] = classification_eval(snli_ve(split), limit=0)
    if size == "large":
        config.published = (("dev/accuracy", 89.45), ("test/accuracy", 89.29))
    config.checkpoint.best_metric = "dev/accuracy"
    return config
