"""An hour on two CPU cores: the ``full`` scenes with the real recipe, teacher and queue.

``configs/scenes.py:<task>`` fine-tunes it, ``--config.init_from=runs/scenes``: see
``configs/scene_tasks.py``.
"""

from ml_collections import ConfigDict

from configs.scene_tasks import FIELDS, finetune, scenes
from mplug_jax.config import caption_eval, defaults, retrieval_eval

LEVEL = "full"
ALONE = {"max_objects": 1, "sized": True}
PAIRS = {"max_objects": 2, "sized": True}


def get_config(task: str = "pretrain") -> ConfigDict:
    """Pre-training, or the fine-tuning of a task."""
    config = pretrain()
    if task != "pretrain":
        finetune(config, task, LEVEL)
    return config


def pretrain() -> ConfigDict:
    """A 1.9M-parameter mPLUG: a cross and a connected fusion layer, one ViT layer."""
    config = defaults("tiny")
    config.total_steps = 9500
    config.batch_size = 32
    config.log_every = 100
    config.eval_every = 2375
    config.checkpoint_every = 500
    config.model.vision.update({"image_size": (64, 64), "patch_size": (8, 8)})
    config.model.vision.update({"width": 128, "depth": 1, "heads": 4, "mlp_dim": 512})
    config.model.text.update({"vocab_size": 0, "width": 128, "heads": 4, "mlp_dim": 512})
    config.model.text.update({"init_std": 0.08, "cross_gain": 1.6})
    config.model.fusion.update({"depth": 2, "schedule": "paper", "stride": 1})
    config.model.decoder.depth = 2
    config.model.vision.qk_norm = config.model.text.qk_norm = True
    config.model.scan_unroll = 3
    with config.objectives.unlocked():
        config.objectives.update(
            {"momentum": 0.99, "momentum_warmup": True, "alpha_ramp_steps": 9500}
        )
        # Colours and places are enough for ITC, and its gradients are the largest by far.
        config.objectives.itc.update({"weight": 0.25, "alpha": 0.4, "queue_size": 1024})
        config.objectives.itm.update({"weight": 0.5, "fraction": 0.25})
        config.objectives.mlm.rate = 0.25
        config.objectives.prefix.empty_rate = 0.8
    config.optimizer.update(
        {"lr": 1.2e-3, "b2": 0.98, "warmup_steps": 200, "warmup_lr": 0.0, "min_lr": 1e-5}
    )
    # At the others' rate it falls to 0.007 within a hundred steps and the gradients explode.
    config.optimizer.rules += (("^temperature$", {"lr": 5e-5}),)
    config.data.update(
        {
            # Shapes are learnt first where there is no second object to confuse them with, and far
            # sooner where the size is told, too, which needs the same features. Relations come
            # from scenes of two objects.
            "train": (
                scenes(LEVEL, "train", size=30_000, cache=True, weight=1.0),
                scenes(LEVEL, "train", **ALONE, size=15_000, cache=True, seed=1, weight=0.7),
                scenes(LEVEL, "train", **PAIRS, size=15_000, cache=True, seed=2, weight=0.6),
            ),
            "tokenizer": {
                "kind": "sentencepiece",
                "path": "",
                "vocab_size": 400,
                "texts": (scenes(LEVEL, "train", *FIELDS, size=1000),),
            },
            "text_length": 29,
            "target_length": 29,
            "crop_scale": None,
            "flip": False,
            "randaugment": False,
        }
    )
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(scenes(LEVEL, "val"), limit=256, rerank=32)
        config.evals.caption = caption_eval(scenes(LEVEL, "val"), limit=256, max_length=29)
    config.checkpoint.best_metric = "retrieval/txt_r1"
    return config
