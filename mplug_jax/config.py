"""Configuration: the defaults, and what is built from a config.

A config file is a short Python file with ``get_config(arg) -> ConfigDict`` that starts from
``defaults(...)`` and changes what its experiment is about. The result is locked: a key that does
not exist here is an error that names the nearest one that does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    preset,
)


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, why, and what would."""


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """What data and models refuse while they are built from a config is a mistake in it."""
    try:
        yield
    except ValueError as error:
        if type(error) is ValueError:
            raise ConfigError(str(error)) from error
        raise


def defaults(model: str) -> ConfigDict:
    """All settings with the values of the paper's pre-training, for a model preset.

    ``docs/architecture.md`` explains each group; comments here give units.
    """
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.total_steps = 100_000  # updates
    config.batch_size = 1024  # pairs of an update, over all devices
    config.accumulate = 1  # micro-batches of an update
    config.log_every = 100  # steps, as all *_every; 0: never
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.max_skipped = 0  # so many steps in a row whose loss is no number end the run; 0: one
    # A loss so many standard deviations above the last ones is told and counted; 0: none.
    config.spike_factor = 8.0
    config.init_from = config_dict.placeholder(str)  # a workdir or checkpoint to start from
    # devices along each axis, whose product is their number; -1 takes what is left
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.model = ConfigDict(dataclasses.asdict(preset(model)))
    config.objectives = ConfigDict(
        {
            "momentum": 0.995,  # EMA decay of the teacher; 0: no teacher
            "momentum_warmup": False,  # min(decay, (1 + step) / (10 + step)), for short runs
            "teacher_frozen": (),  # patterns of what it keeps; official, by mistake: ("^fusion/",)
            "alpha_ramp_steps": 1_000,  # over which every alpha rises from 0
            "official_sequence_softmax": False,  # their distillation's axis: see distillation.py
            "itc": {"weight": 1.0, "alpha": 0.4, "queue_size": 65536},
            # fraction: of the batch's pairs, evenly spaced
            # hard_ramp_steps: over which negatives grow from random ones to hard ones; 0: at once
            # pool: so many rows that follow each other draw negatives from each other; 0: all of
            # the micro-batch; official: the rows of one device
            "itm": {"weight": 1.0, "fraction": 1.0, "hard_ramp_steps": 0, "pool": 0},
            "mlm": {"weight": 1.0, "fraction": 1.0, "alpha": 0.4, "rate": 0.15},
            "prefix": {"weight": 1.0, "fraction": 1.0, "alpha": 0.4, "empty_rate": 0.0},
        }
    )
    config.finetune = ConfigDict(
        {
            # prompt: what every caption continues, "a picture of" with the official weights;
            # memory: what the decoder reads, 'image' (official) or 'fused' with an empty text
            "caption": {"prompt": "", "memory": "image"},
            "scst": {
                "search": "beam",  # or sample
                "texts": 5,  # of a picture
                "max_length": 25,  # tokens, as in the evaluator
                "min_length": 0,
                "length_penalty": 0.6,
                "procedure": "standard",  # of beam search, or official
                "baseline": "mean",  # of the picture's own texts (official), or greedy
                "chunks": 2,  # parts of a batch: one is rewarded while the next is decoded
            },
            # answers: the most frequent ones that are learnt; alpha: distillation, which the
            # official code switches off by mistake
            "vqa": {"answers": 10, "alpha": 0.0, "context": True},
            "grounding": {
                "bins": 337,
                "appended": False,  # to the vocabulary; False: BERT's [unused] tokens (official)
                # or own (each picture's), or none: plain cross-entropy, which learns soonest here
                "weighting": "official",
            },
        }
    )
    config.optimizer = ConfigDict(
        {
            "lr": 1e-4,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.02,
            "clip_norm": 1.0,  # 0: no clipping
            "warmup_steps": 2_000,
            "warmup_lr": 1e-6,
            "min_lr": 1e-6,
            "schedule": "cosine",  # or constant, official
            "official": {  # schedule 'official' alone: a staircase by epochs
                "epochs": 0,
                "warmup_units": 0,  # of 100 iterations of the first epoch
                "steps_per_epoch": 0,  # 0: total_steps / epochs
                "iterations_per_step": 1,  # official batches of an update
            },
            "rules": (NO_DECAY,),
            "offload": False,  # keeps the moments in the host's memory between their uses
        }
    )
    config.data = ConfigDict(
        {
            "root": config_dict.placeholder(str),
            "train": (),
            # texts: a source that SentencePiece is trained on, if not the first of `train`
            "tokenizer": {"kind": "wordpiece", "path": "vocab.txt", "vocab_size": 0, "texts": ()},
            "text_length": 30,  # tokens, with [CLS] and [SEP]
            "target_length": 30,
            "crop_scale": (0.2, 1.0),
            "flip": True,
            "randaugment": True,
            "decoder": "pillow",  # of training pictures: exact; 'fast' is not quite
            "cached_variants": 0,  # of a frozen encoder's output: 1: as it is, 2: and mirrored
            "workers": 0,  # processes that make batches; 0: threads
            "threads": 2,
            "max_bad_fraction": 0.01,
        }
    )
    config.evals = ConfigDict()
    config.published = ()  # ("<evaluator>/<metric>", figure) that evaluate prints beside its own
    config.checkpoint = ConfigDict({"keep_last": 2, "best_metric": "", "best_mode": "max"})
    config.checkpoint.wait = False  # True: no step begins before a save is complete on disk
    return config.lock()


# Biases, LayerNorms and single vectors are not decayed (the official list misses CLIP's norms).
NO_DECAY = (
    r"(bias|scale|class_embedding|position_embedding|temperature)$",
    {"weight_decay": 0.0},
)
# The official list, ["bias", "LayerNorm.weight"]: the norms of the ViT and the bridge do decay.
OFFICIAL_NO_DECAY = (r"(bias|(?<!bridge/)layer_norm/scale)$", {"weight_decay": 0.0})


def retrieval_eval(
    source: Mapping[str, Any], *, limit: int, rerank: int, captions: int = 1, score: str = "itm"
) -> dict[str, Any]:
    """Settings of a retrieval evaluator: ITC ranking, then ITM over the ``rerank`` best.

    ``limit``: pictures, here and below; 0 takes all. ``captions``: texts of a picture, its first
    ones; 0 takes all. ``score``: 'itm', the match logit; 'itm+sim', with the ITC similarity added
    to it, as in the official video retrieval; 'itm+itc', the log odds of a match and the similarity
    over the temperature, which is the probability that hard negatives teach.
    """
    settings = {"limit": limit, "rerank": rerank, "captions": captions, "score": score}
    return {"kind": "retrieval", "source": dict(source), **settings}


def caption_eval(
    source: Mapping[str, Any],
    *,
    limit: int,
    max_length: int,
    min_length: int = 0,
    beams: int = 1,
    procedure: str = "standard",
    memory: str = "fused",
    prompt: str = "",
) -> dict[str, Any]:
    """Settings of a captioning evaluator: the best of ``beams``, ``max_length`` tokens at most.

    ``procedure``, ``memory`` and ``prompt`` as in ``config.finetune``; a single beam is greedy.
    """
    lengths = {"max_length": max_length, "min_length": min_length}
    search = {"beams": beams, "procedure": procedure, "memory": memory, "prompt": prompt}
    return {"kind": "caption", "source": dict(source), "limit": limit, **lengths, **search}


def vqa_eval(
    source: Mapping[str, Any],
    *,
    limit: int,
    answers: str = "generate",
    answer_list: str = "",
    rank: int = 128,
    beams: int = 1,
    max_length: int = 10,
    procedure: str = "standard",
) -> dict[str, Any]:
    """Settings of a VQA evaluator over ``limit`` questions (0: all).

    ``answers``: 'generate' texts of ``max_length`` tokens by ``beams``, or 'rank' the candidates:
    those of ``answer_list`` (a JSON list under data.root), or without it all answers of the
    source; the ``rank`` ones whose first token is likeliest are scored whole. ``procedure``
    'official' also counts that token twice, as the official ranking does.
    """
    chosen = {"answers": answers, "answer_list": answer_list, "rank": rank}
    search = {"beams": beams, "max_length": max_length, "procedure": procedure}
    return {"kind": "vqa", "source": dict(source), "limit": limit, **chosen, **search}


def grounding_eval(source: Mapping[str, Any], *, limit: int) -> dict[str, Any]:
    """Settings of a grounding evaluator over ``limit`` phrases (0: all)."""
    return {"kind": "grounding", "source": dict(source), "limit": limit}


def classification_eval(source: Mapping[str, Any], *, limit: int) -> dict[str, Any]:
    """Settings of an accuracy over ``limit`` records, of what ``config.task`` decides."""
    return {"kind": "classification", "source": dict(source), "limit": limit}


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model of a config; ``model.text.vocab_size`` 0 takes the tokenizer's.

    Raises:
      ConfigError: the tokenizer has more tokens than the model.
    """
    settings = config.model.to_dict()
    parts = {
        "vision": VisionConfig,
        "text": TextConfig,
        "fusion": FusionConfig,
        "decoder": DecoderConfig,
    }
    wanted = settings["text"]["vocab_size"]
    if wanted and wanted < vocab_size:
        raise ConfigError(
            f"config.model.text.vocab_size={wanted}, but the tokenizer has {vocab_size} tokens. "
            "Set it to 0 to take the tokenizer's."
        )
    settings["text"]["vocab_size"] = wanted or vocab_size
    try:
        built = {name: part(**_tuples(settings[name])) for name, part in parts.items()}
        return ModelConfig(**{**_tuples(settings), **built})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def save_config(config: ConfigDict, workdir: str | Path) -> None:
    """Writes config.json into the workdir; it appears whole or not at all."""
    path = Path(workdir) / "config.json"
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    os.replace(partial, path)
