"""Image-text retrieval on COCO, Karpathy's splits, from a pre-trained checkpoint.

``configs/retrieval_coco.py:large``; the official code has no recipe for base, and ``:base`` takes
the rates of large. ``config.data.root`` holds ``dataset_coco.json``, ``train2014/``, ``val2014/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import COCO_CAPTIONS, start, train_for
from mplug_jax.config import retrieval_eval


def karpathy(path: str, split: str, **settings: str) -> dict[str, Any]:
    """The captions of one of Karpathy's splits."""
    return {"kind": "retrieval", "path": path, "split": split, **settings}


def finetune(
    config: ConfigDict, items: int, batch: int, epochs: int = 8, queue_size: int = 65536
) -> None:
    """ITC and ITM at the official rates, with the teacher that fills the queue."""
    train_for(
        config,
        epochs=epochs,
        items=items,
        batch=batch,
        lr=1e-5,
        vision_lr=2e-6,
        warmup_units=1,
        unused=("decoder", "mlm_head"),
    )
    objectives = config.objectives
    objectives.momentum = 0.995
    objectives.alpha_ramp_steps = config.optimizer.official.steps_per_epoch
    objectives.itc.update({"alpha": 0.4, "queue_size": queue_size})
    objectives.mlm.weight = objectives.prefix.weight = 0.0
    config.data.text_length = 30


def get_config(size: str = "large") -> ConfigDict:
    """Eight epochs; the 256 best of ITC are ranked again."""
    config = start("retrieval", size)
    finetune(config, COCO_CAPTIONS, 128 * 8)
    config.data.train = (karpathy("dataset_coco.json", "train"),)
    with config.evals.unlocked():
        for split in ("val", "test"):
            source = karpathy("dataset_coco.json", split)
            config.evals[split] = retrieval_eval(source, limit=0, rerank=256, captions=5)
    if size == "large":
        config.published = (("test/txt_r1", 82.8), ("test/img_r1", 65.8))
    config.checkpoint.best_metric = "val/r_mean"
    return config
