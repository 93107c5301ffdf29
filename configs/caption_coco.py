"""Captioning of COCO by cross-entropy, Karpathy's splits, from a pre-trained checkpoint.

``configs/caption_coco.py:base`` or ``:large``. ``config.data.root`` holds ``dataset_coco.json``,
``train2014/`` and ``val2014/``. Four accumulated batches of 64 on 4 devices make an update.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import COCO_CAPTIONS, HEADS, start, train_for
from mplug_jax.config import caption_eval

LENGTH = 25  # tokens, read and written
# The decoder reads the picture alone, so these have no gradient.
UNUSED = ("text_encoder", "fusion", *HEADS)


def coco(split: str) -> dict[str, Any]:
    """The captions of one of Karpathy's splits."""
    return {"kind": "captions", "path": "dataset_coco.json", "split": split}


def written(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An evaluator with the official search; ``procedure="official"`` never retires a beam."""
    settings = {"max_length": LENGTH, "min_length": 8, "beams": 5, "memory": "image", **changes}
    return caption_eval(source, limit=0, **settings)


def get_config(size: str = "base") -> ConfigDict:
    """Five epochs; the checkpoint of the best CIDEr on val is kept."""
    config = start("caption", size)
    train_for(
        config,
        epochs=5,
        items=COCO_CAPTIONS,
        batch=64 * 4 * 4,
        accumulate=4,
        lr=1e-5,
        vision_lr=5e-6,
        warmup_units=4,
        unused=UNUSED,
    )
    config.finetune.caption.memory = "image"
    config.data.train = (coco("train"),)
    config.data.target_length = LENGTH
    with config.evals.unlocked():
        config.evals.val, config.evals.test = written(coco("val")), written(coco("test"))
    config.published = (("test/cider", {"base": 137.5, "large": 141.0}[size]),)
    config.checkpoint.best_metric = "val/cider"
    return config
