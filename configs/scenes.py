"""About an hour on two CPU cores: the ``full`` scenes with the real recipe, teacher and queue."""

from ml_collections import ConfigDict

from mplug_jax.config import caption_eval, defaults, retrieval_eval

HELD_OUT = {"kind": "scenes", "level": "full", "split": "val"}


def get_config() -> ConfigDict:
    """A 3M-parameter mPLUG: a cross and a connected fusion layer."""
    config = defaults("tiny")
    config.total_steps = 2000
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 250
    config.model.vision.update(
        {"image_size": (64, 64), "width": 128, "depth": 3, "heads": 4, "mlp_dim": 512}
    )
    config.model.text.update({"vocab_size": 0, "width": 128, "heads": 4, "mlp_dim": 512})
    config.model.text.init_std = 0.08
    config.model.fusion.update({"depth": 2, "schedule": "paper", "stride": 1})
    config.model.decoder.depth = 2
    config.model.scan_unroll = 3
    with config.objectives.unlocked():
        config.objectives.update(
            {"momentum": 0.99, "momentum_warmup": True, "alpha_ramp_steps": 2000}
        )
        config.objectives.itc.update({"alpha": 0.4, "queue_size": 1024})
        config.objectives.itm.fraction = 0.25
        config.objectives.mlm.rate = 0.25
        config.objectives.prefix.empty_rate = 0.5
    config.optimizer.update(
        {"lr": 1.5e-3, "b2": 0.98, "warmup_steps": 100, "warmup_lr": 0.0, "min_lr": 1e-5}
    )
    # At the others' rate it falls to 0.007 within a hundred steps and the gradients explode.
    config.optimizer.rules += (("^temperature$", {"lr": 5e-5}),)
    config.data.update(
        {
            "train": ({"kind": "scenes", "level": "full", "split": "train"},),
            "tokenizer": {"kind": "sentencepiece", "path": "", "vocab_size": 256},
            "text_length": 29,
            "target_length": 29,
            "crop_scale": None,
            "flip": False,
            "randaugment": False,
        }
    )
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(HELD_OUT, limit=256, rerank=32)
        config.evals.caption = caption_eval(HELD_OUT, limit=256, max_length=29)
    config.checkpoint.best_metric = "retrieval/txt_r1"
    return config
