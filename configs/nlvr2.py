"""NLVR2 from a pre-trained checkpoint: is a sentence true of two pictures?

``configs/nlvr2.py:base`` or ``:large``. The official code has no recipe: rates, epochs and batch
are those of ALBEF's ``configs/NLVR.yaml``, without its distillation and its extra pre-training.
``config.data.root`` holds ``train.json``, ``dev.json``, ``test1.json`` (test-P) and the pictures in
``images/train/``, ``dev/`` and ``test1/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import HEADS, start, train_for
from mplug_jax.config import classification_eval

SENTENCES = 86_373  # of train (Suhr et al. 2019)


def nlvr2(split: str) -> dict[str, Any]:
    """The sentences of a split, with the folders of the published archives."""
    folder = "images/train" if split == "train" else split
    return {"kind": "nlvr2", "path": f"{split}.json", "images": folder}


def get_config(size: str = "base") -> ConfigDict:
    """Ten epochs of 16 sentences on 8 devices."""
    config = start("nlvr2", size)
    train_for(
        config,
        epochs=10,
        items=SENTENCES,
        batch=16 * 8,
        lr=2e-5,
        vision_lr=2e-5,
        warmup_units=1,
        unused=("decoder", *HEADS),
    )
    config.model.update({"classes": 2, "classified": 2})
    config.data.train = (nlvr2("train"),)
    config.data.text_length = 40
    config.data.flip = False  # Sentences say left and right.
    with config.evals.unlocked():
        for name, split in (("dev", "dev"), ("test", "test1")):
            config.evals[name] = classification_eval(nlvr2(split), limit=0)
    if size == "large":  # of base there are none
        config.published = (("dev/accuracy", 84.58), ("test/accuracy", 84.95))
    config.checkpoint.best_metric = "dev/accuracy"
    return config
