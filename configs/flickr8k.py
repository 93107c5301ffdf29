"""Real photographs: Flickr8k's 6,000 photos, ``--config.data.root=<folder>``, on two CPU cores.

The folder holds ``train.json`` and ``val.json``, each ``[{"image": name, "caption": [five]}]``,
and the photos they name.

- ``configs/flickr8k.py``: 3.2M parameters from scratch, with a vocabulary of its own;
- ``configs/flickr8k.py:small``: from DINOv2 ViT-S/14 and MiniLM-L6, which ``python -m
  mplug_jax.convert towers --align=6000`` turns into ``--config.init_from``; BERT's ``vocab.txt`` in
  the folder.
"""

from ml_collections import ConfigDict

from mplug_jax.config import caption_eval, defaults, retrieval_eval
from mplug_jax.models.config import DINOV2

TRAIN = {"kind": "retrieval", "path": "train.json"}
VAL = {"kind": "retrieval", "path": "val.json"}


def get_config(size: str = "scratch") -> ConfigDict:
    """The config of either size.

    Raises:
      ValueError: another size.
    """
    if size not in ("scratch", "small"):
        raise ValueError(f"configs/flickr8k.py:{size} is unknown; choose scratch or small.")
    config = scratch() if size == "scratch" else small()
    with config.objectives.unlocked():
        # A teacher and a queue need thousands of steps before they help.
        config.objectives.momentum = 0.0
        config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
        config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
        config.objectives.itm.fraction = 0.25 if size == "scratch" else 0.75
        config.objectives.prefix.empty_rate = 0.5
    config.data.train = (TRAIN,)
    config.data.randaugment = False
    config.checkpoint.best_metric = "retrieval/r_mean"
    return config


def scratch() -> ConfigDict:
    """A 3.2M-parameter mPLUG at 112 px, of the full scenes' width, 32 passes over the photos."""
    config = defaults("tiny")
    config.total_steps = 3000
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 250
    config.model.vision.update({"image_size": (112, 112), "patch_size": (16, 16)})
    config.model.vision.update({"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512})
    config.model.text.update({"vocab_size": 0, "width": 128, "heads": 4, "mlp_dim": 512})
    config.model.text.update({"init_std": 0.08, "cross_gain": 1.6, "dropout": 0.1})
    config.model.vision.qk_norm = config.model.text.qk_norm = True
    config.model.fusion.update({"depth": 2, "stride": 1})
    config.model.embed_dim = 128
    config.model.scan_unroll = 4
    config.objectives.itm.hard_ramp_steps = 1500
    config.objectives.mlm.weight = 0.25
    config.objectives.prefix.weight = 0.5
    config.optimizer.update(
        {"lr": 1e-3, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 150, "warmup_lr": 0.0}
    )
    config.optimizer.rules += (("^temperature$", {"lr": 1e-4}),)
    config.data.tokenizer.update({"kind": "sentencepiece", "path": "", "vocab_size": 3000})
    config.data.update({"text_length": 24, "target_length": 24, "crop_scale": (0.5, 1.0)})
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(
            VAL, limit=1000, rerank=16, captions=0, score="itm+itc"
        )
        config.evals.caption = caption_eval(VAL, limit=1000, max_length=24)
    return config


def small() -> ConfigDict:
    """70M parameters of width 384 at 112 px; the image encoder is frozen, its output kept."""
    config = defaults("small")
    config.total_steps = 880
    config.batch_size = 96
    config.log_every = 10
    config.eval_every = 0
    config.checkpoint_every = 100
    config.model.vision.update({**DINOV2, "image_size": (112, 112), "attention_dropout": 0.0})
    config.model.fusion.update({"depth": 3, "schedule": "paper", "stride": 2})
    config.model.decoder.depth = 3
    config.model.bridge = True
    config.model.text.attention_dropout = 0.0
    # With hard negatives from the start nothing is to be learnt from [CLS], and it fades.
    config.objectives.itm.hard_ramp_steps = 400
    # The gradients of MLM and prefix LM are the largest by far: at full weight all that the fused
    # text has to tell apart is learnt for them. The decoder, theirs alone, does not mind with Adam.
    config.objectives.mlm.update({"weight": 0.05, "fraction": 0.0625})
    config.objectives.prefix.update({"weight": 0.1, "fraction": 0.25})
    config.optimizer.update({"lr": 1e-4, "b2": 0.98, "warmup_steps": 60, "warmup_lr": 0.0})
    config.optimizer.rules += (
        ("^visual_encoder/", {"freeze": True}),
        ("^text_encoder/", {"lr": 2e-4}),
        ("^decoder/", {"lr": 4e-4}),
        ("^fusion/", {"lr": 2e-4}),
        ("^(vision_proj|text_proj|itm_head)/", {"lr": 1e-3}),
        ("^temperature$", {"lr": 5e-4}),
    )
    config.data.update({"text_length": 18, "target_length": 20, "cached_variants": 1})
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(
            VAL, limit=1000, rerank=16, captions=0, score="itm+itc"
        )
        config.evals.caption = caption_eval(VAL, limit=1000, beams=3, max_length=20)
    return config
