"""VQA v2 and Visual Genome's questions, from a pre-trained checkpoint.

``config.data.root`` holds VQA v2's files as published, ``train2014/``, ``val2014/``, Visual
Genome's ``question_answers.json`` and all its pictures in one folder ``visual_genome/``.

- ``configs/vqa_v2.py:base`` or ``:large``: the official training data, train, val and Visual
  Genome. Questions of val, the official minival included, are then no held-out set.
- ``:base_heldout``, ``:large_heldout``: train alone, so that the figure on val can be believed.
- ``:base_test``, ``:large_test``, to evaluate a run of ``:base`` or ``:large``: the questions of
  test, which has no public answers (beside the rest ``v2_OpenEnded_mscoco_test2015_questions.json``
  and ``test2015/``). ``samples/answers.json`` is what the server takes.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import HEADS, start, train_for
from mplug_jax.config import vqa_eval

# VQA v2 (Goyal et al. 2017), 658,111 together; Visual Genome 1.2 (Krishna et al. 2017). The
# official reader takes a selection of Visual Genome whose size is not published.
QUESTIONS = {"train": 443_757, "val": 214_354, "visual_genome": 1_445_322}
PER_DEVICE = {"base": 128, "large": 256}
TEST_DEV = {"base": 79.79, "large": 81.27}


def vqa_v2(split: str) -> dict[str, Any]:
    """The questions and answers of train or val."""
    annotations = {"annotations": f"v2_mscoco_{split}2014_annotations.json"}
    return questions(f"{split}2014") | annotations


def questions(split: str) -> dict[str, Any]:
    """The questions of a split alone."""
    path = f"v2_OpenEnded_mscoco_{split}_questions.json"
    return {"kind": "vqa", "path": path, "images": split}


VISUAL_GENOME = {"kind": "vqa", "path": "question_answers.json", "images": "visual_genome"}


def get_config(arg: str = "base") -> ConfigDict:
    """Eight epochs in bfloat16 with clipped gradients."""
    size, _, variant = arg.partition("_")
    if variant not in ("", "heldout", "test"):
        raise ValueError(
            f"configs/vqa_v2.py:{arg} is unknown; after the size comes _heldout or _test."
        )
    config = start("vqa", size)
    parts = ("train",) if variant == "heldout" else tuple(QUESTIONS)
    train_for(
        config,
        epochs=8,
        items=sum(QUESTIONS[part] for part in parts),
        batch=PER_DEVICE[size] * 8,
        lr=3e-5,
        vision_lr=5e-6,
        warmup_units=4,
        unused=HEADS,
    )
    config.optimizer.clip_norm = 1.0
    config.model.dtype = "bfloat16"
    config.finetune.vqa.update({"answers": 10, "alpha": 0.0, "context": True})
    config.data.train = (vqa_v2("train"), vqa_v2("val"), VISUAL_GENOME)[: len(parts)]
    config.data.update({"text_length": 80, "target_length": 16})
    search = {"limit": 0, "beams": 5, "max_length": 10}
    with config.evals.unlocked():
        if variant == "test":
            config.evals.test = vqa_eval(questions("test2015"), **search)
            config.published = (("test/accuracy", TEST_DEV[size]),)
        else:
            config.evals.val = vqa_eval(vqa_v2("val"), **search)
            config.checkpoint.best_metric = "val/accuracy"
    return config
