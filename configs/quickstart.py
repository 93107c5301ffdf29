"""Ten minutes on two CPU cores: a tiny mPLUG pre-trained on the embedded ``easy`` scenes.

``configs/quickstart.py:<task>`` fine-tunes it, ``--config.init_from=runs/quickstart``, in a few
minutes more: see ``configs/scene_tasks.py``.
"""

from ml_collections import ConfigDict

from configs.scene_tasks import FIELDS, finetune, scenes
from mplug_jax.config import caption_eval, defaults, retrieval_eval

LEVEL = "easy"


def get_config(task: str = "pretrain") -> ConfigDict:
    """Pre-training, or the fine-tuning of a task."""
    config = pretrain()
    if task != "pretrain":
        finetune(config, task, LEVEL)
    return config


def pretrain() -> ConfigDict:
    """No files, no momentum model, no queue."""
    config = defaults("tiny")
    config.total_steps = 3200
    config.batch_size = 32
    config.log_every = 100
    config.eval_every = 1600
    config.checkpoint_every = 800
    config.model.text.vocab_size = 0
    config.model.scan_unroll = 3
    config.model.fusion.update({"depth": 2, "stride": 1})
    # One layer, so that a picture token tells of the object under it and hardly of the others:
    # words are bound to objects sooner. So they are by normalised queries and keys.
    config.model.vision.depth = 1
    config.model.vision.qk_norm = config.model.text.qk_norm = True
    with config.objectives.unlocked():
        config.objectives.momentum = 0.0
        config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
        config.objectives.itm.fraction = 0.25
        config.objectives.mlm.update({"alpha": 0.0, "rate": 0.25})
        config.objectives.prefix.update({"alpha": 0.0, "empty_rate": 0.5})
    config.optimizer.update(
        {"lr": 1.5e-3, "b2": 0.98, "warmup_steps": 150, "warmup_lr": 0.0, "min_lr": 1e-5}
    )
    config.data.update(
        {
            # Seen five times each: with as many new ones instead, half as much is learnt midway.
            "train": (scenes(LEVEL, "train", size=20_000, cache=True),),
            "tokenizer": {
                "kind": "sentencepiece",
                "path": "",
                "vocab_size": 256,
                # The words of every task, so that all of them can start from this run.
                "texts": (scenes(LEVEL, "train", *FIELDS, size=1000),),
            },
            "text_length": 17,
            "target_length": 17,
            "crop_scale": None,
            "flip": False,
            "randaugment": False,
        }
    )
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(scenes(LEVEL, "val"), limit=256, rerank=32)
        config.evals.caption = caption_eval(scenes(LEVEL, "val"), limit=256, max_length=17)
    config.checkpoint.best_metric = "retrieval/txt_r1"
    return config
