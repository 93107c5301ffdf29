"""Text-video retrieval on MSRVTT (1k-A split) with mPLUG-large, zero-shot or fine-tuned.

Zero-shot: the evaluator on a pre-trained checkpoint or on a run of ``retrieval_coco.py``. The
official code never fine-tunes on clips; batch and epochs here are ours, the rates those of
retrieval. ``config.data.root`` holds ``msrvtt_train.jsonl`` and ``msrvtt_test.jsonl``, lines of
``{clip_name, caption}``, and the clips in ``videos/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import start
from configs.retrieval_coco import finetune
from mplug_jax.config import retrieval_eval

CAPTIONS = 180_000  # 20 of each of 9,000 training clips (Xu et al. 2016; split of Yu et al. 2018)


def msrvtt(split: str) -> dict[str, Any]:
    """The captions of a split."""
    return {"kind": "video", "path": f"msrvtt_{split}.jsonl", "videos": "videos"}


def get_config() -> ConfigDict:
    """12 frames of 224 px a clip; the 128 best of ITC are ranked again."""
    config = start("retrieval", "large")
    # A longer queue would hold most clips several times.
    finetune(config, CAPTIONS, batch=128, epochs=5, queue_size=4096)
    config.model.frames = 12
    config.model.vision.image_size = (224, 224)
    config.data.train = (msrvtt("train"),)
    with config.evals.unlocked():
        config.evals.test = retrieval_eval(msrvtt("test"), limit=0, rerank=128, score="itm+sim")
    config.published = (("test/img_r1", 38.1),)  # zero-shot from pre-training; after COCO 44.3
    config.checkpoint.best_metric = "test/r_mean"
    return config
