"""Captions of VATEX's clips (English) with mPLUG-large, zero-shot or fine-tuned.

Zero-shot: the evaluator on a run of ``caption_coco.py:large`` or a pre-trained checkpoint. The
official code never fine-tunes on clips; batch and epochs here are ours, the rates those of
captioning. ``config.data.root`` holds ``vatex_training_v1.0.json``,
``vatex_validation_v1.0.json``, ``vatex_public_test_english_v1.1.json``, the clips in ``videos/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.caption_coco import UNUSED, written
from configs.official import start, train_for

CAPTIONS = 259_910  # 10 of each of 25,991 training clips (Wang et al. 2019)
PROMPT = "a picture of"


def vatex(part: str) -> dict[str, Any]:
    """The English captions of a part."""
    return {"kind": "video", "path": f"vatex_{part}.json", "videos": "videos"}


def get_config() -> ConfigDict:
    """8 frames of 448 px a clip, which the decoder reads as they are; beam search of 10."""
    config = start("caption", "large")
    train_for(
        config,
        epochs=5,
        items=CAPTIONS,
        batch=128,
        lr=1e-5,
        vision_lr=5e-6,
        warmup_units=4,
        unused=UNUSED,
    )
    config.model.frames = 8
    config.model.vision.image_size = (448, 448)
    config.finetune.caption.update({"prompt": PROMPT, "memory": "image"})
    config.data.train = (vatex("training_v1.0"),)
    config.data.target_length = 32
    search = {"prompt": PROMPT, "beams": 10, "min_length": 15}
    parts = {"val": "validation_v1.0", "test": "public_test_english_v1.1"}
    with config.evals.unlocked():
        for name, part in parts.items():
            config.evals[name] = written(vatex(part), **search)
    config.published = (("test/cider", 42.0),)  # zero-shot
    config.checkpoint.best_metric = "val/cider"
    return config
