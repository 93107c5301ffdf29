"""Ten minutes on two CPU cores: a tiny mPLUG pre-trained on the embedded ``easy`` scenes."""

from ml_collections import ConfigDict

from mplug_jax.config import caption_eval, defaults, retrieval_eval

HELD_OUT = {"kind": "scenes", "level": "easy", "split": "val"}


def get_config() -> ConfigDict:
    """The quickstart: no files, no momentum model, no queue."""
    config = defaults("tiny")
    config.total_steps = 1400
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 700
    config.checkpoint_every = 350
    config.model.text.vocab_size = 0
    config.model.scan_unroll = 3
    config.model.fusion.update({"depth": 2, "stride": 1})
    with config.objectives.unlocked():
        config.objectives.momentum = 0.0
        config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
        config.objectives.itm.fraction = 0.25
        config.objectives.mlm.update({"alpha": 0.0, "rate": 0.25})
        config.objectives.prefix.update({"alpha": 0.0, "empty_rate": 0.5})
    config.optimizer.update(
        {"lr": 2e-3, "b2": 0.98, "warmup_steps": 100, "warmup_lr": 0.0, "min_lr": 1e-5}
    )
    config.data.update(
        {
            "train": ({"kind": "scenes", "level": "easy", "split": "train", "cache": True},),
            "tokenizer": {"kind": "sentencepiece", "path": "", "vocab_size": 256},
            "text_length": 17,
            "target_length": 17,
            "crop_scale": None,
            "flip": False,
            "randaugment": False,
        }
    )
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(HELD_OUT, limit=256, rerank=32)
        config.evals.caption = caption_eval(HELD_OUT, limit=256, max_length=17)
    config.checkpoint.best_metric = "retrieval/txt_r1"
    return config
