"""Captioning of COCO by SCST on CIDEr, ``--config.init_from=`` a run of ``caption_coco.py``.

``configs/caption_coco_scst.py:base`` or ``:large``; files as in ``caption_coco.py``.
"""

from ml_collections import ConfigDict

from configs import caption_coco
from configs.official import COCO_CAPTIONS, train_for

PER_DEVICE = {"base": 32, "large": 64}


def get_config(size: str = "base") -> ConfigDict:
    """Five epochs over captions, whose texts come from the same search as the evaluators'."""
    config = caption_coco.get_config(size)
    config.task = "scst"
    train_for(
        config,
        epochs=5,
        items=COCO_CAPTIONS,
        batch=PER_DEVICE[size] * 4,
        lr=1e-6,
        vision_lr=1e-6,
        warmup_units=4,
        min_lr=8e-8,
        unused=caption_coco.UNUSED,
    )
    config.finetune.scst.update({"search": "beam", "texts": 5, "baseline": "mean"})
    config.finetune.scst.update({"max_length": caption_coco.LENGTH, "min_length": 8})
    config.eval_every = config.checkpoint_every = 500
    config.published = (("test/cider", {"base": 150.4, "large": 155.1}[size]),)
    return config
