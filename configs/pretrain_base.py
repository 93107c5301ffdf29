"""The paper's pre-training of mPLUG-base (facts of the official recipe; 1,024 pairs a step).

``--config.data.root`` holds ``vocab.txt`` beside the annotations; each source is a JSON file of
image-caption pairs and a folder of images (docs/data.md).
"""

from ml_collections import ConfigDict

from mplug_jax.config import defaults, retrieval_eval

SOURCES = ("coco", "vg", "sbu", "cc3m", "cc12m")
PAIRS = 14_900_000  # 567K + 769K + 860K + 3M + 10M, rounded to what is published
EPOCHS = 30


def get_config() -> ConfigDict:
    """ViT-B/16 at 256 px, official fusion schedule with stride 3."""
    config = defaults("base")
    config.batch_size = 1024
    config.total_steps = EPOCHS * PAIRS // config.batch_size
    # bf16 and clipping are ours: the official recipes have them for VQA alone.
    config.model.dtype = "bfloat16"
    config.optimizer.clip_norm = 1.0
    config.model.remat = "dots_no_batch"
    config.model.temperature_range = (0.001, 0.5)
    config.objectives.alpha_ramp_steps = PAIRS // config.batch_size
    config.optimizer.lr = 1e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.warmup_lr = 1e-6
    config.optimizer.min_lr = 1e-6
    config.optimizer.rules = ((r"^visual_encoder/", {"lr": 1e-5}), *config.optimizer.rules)
    config.data.train = tuple(
        {"kind": "captions", "path": f"{name}.json", "images": name} for name in SOURCES
    )
    config.data.workers = 16
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(
            {"kind": "captions", "path": "dataset_coco.json", "images": "coco", "split": "val"},
            limit=5000,
            rerank=128,
            captions=5,
        )
    config.checkpoint.best_metric = "retrieval/r_mean"
    return config
