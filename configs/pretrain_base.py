"""The paper's pre-training of mPLUG-base (facts of the official recipe; 1,024 pairs a step).

The mixture is the paper's 14 million pictures. ``--config.data.root`` holds ``vocab.txt``, for COCO
and Visual Genome a JSON file of image-caption pairs and a folder of images each, and the folders
``sbu``, ``cc3m`` and ``cc12m`` of tars as img2dataset leaves them (docs/data.md).
"""

from ml_collections import ConfigDict

from mplug_jax.config import defaults, retrieval_eval

# Pairs of each source as published. They are its weight, so that the mixture stays the paper's
# where pictures could no longer be downloaded, and however many captions a record holds.
ANNOTATED = {"coco": 567_000, "vg": 769_000}
FROM_THE_WEB = {"sbu": 860_000, "cc3m": 3_000_000, "cc12m": 10_000_000}
PAIRS = 14_900_000  # all of them, as published
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
    config.objectives.itm.pool = 256  # official: the rows of a device
    config.objectives.alpha_ramp_steps = PAIRS // config.batch_size
    config.optimizer.lr = 1e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.warmup_lr = 1e-6
    config.optimizer.min_lr = 1e-6
    config.optimizer.rules = ((r"^visual_encoder/", {"lr": 1e-5}), *config.optimizer.rules)
    config.data.train = (
        *(
            {"kind": "captions", "path": f"{name}.json", "images": name, "weight": pairs}
            for name, pairs in ANNOTATED.items()
        ),
        *(
            {"kind": "webdataset", "path": name, "weight": pairs}
            for name, pairs in FROM_THE_WEB.items()
        ),
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
