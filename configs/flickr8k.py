"""Real photographs from scratch: Flickr8k's 6,000 photos, ``--config.data.root=<folder>``.

The folder holds ``train.json`` and ``val.json``, each ``[{"image": name, "caption": [five]}]``,
and the photos they name. Sized for two CPU cores.
"""

from ml_collections import ConfigDict

from mplug_jax.config import caption_eval, defaults, retrieval_eval

TRAIN = {"kind": "retrieval", "path": "train.json"}
VAL = {"kind": "retrieval", "path": "val.json"}


def get_config() -> ConfigDict:
    """A 3M-parameter mPLUG at 112 px."""
    config = defaults("tiny")
    config.total_steps = 3000
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 250
    config.model.vision.update(
        {
            "image_size": (112, 112),
            "patch_size": (16, 16),
            "width": 128,
            "depth": 4,
            "heads": 4,
            "mlp_dim": 512,
        }
    )
    config.model.text.update(
        {"vocab_size": 0, "width": 128, "heads": 4, "mlp_dim": 512, "init_std": 0.08}
    )
    config.model.fusion.update({"depth": 2, "stride": 1})
    config.model.embed_dim = 128
    config.model.scan_unroll = 4
    with config.objectives.unlocked():
        # A teacher and a queue need thousands of steps before they help.
        config.objectives.momentum = 0.0
        config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
        config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
        config.objectives.itm.fraction = 0.25
        config.objectives.prefix.empty_rate = 0.5
    config.optimizer.update(
        {"lr": 1e-3, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 150, "warmup_lr": 0.0}
    )
    config.data.update(
        {
            "train": (TRAIN,),
            "tokenizer": {"kind": "sentencepiece", "path": "", "vocab_size": 3000},
            "text_length": 24,
            "target_length": 24,
            "crop_scale": (0.5, 1.0),
            "randaugment": False,
        }
    )
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(VAL, limit=1000, rerank=16, captions=0)
        config.evals.caption = caption_eval(VAL, limit=64, max_length=24)
    config.checkpoint.best_metric = "retrieval/r_mean"
    return config
