"""Fine-tuning on the embedded scenes: what the tasks change in the config of their pre-training.

No experiment of its own; ``configs/quickstart.py:<task>`` and ``configs/scenes.py:<task>`` are.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mplug_jax.config import (
    caption_eval,
    classification_eval,
    grounding_eval,
    retrieval_eval,
    vqa_eval,
)

# Everything that holds words, so that one vocabulary serves all tasks.
FIELDS = ("captions", "questions", "phrases", "pair", "entailment", "clip")


def scenes(level: str, split: str, *fields: str, **settings: Any) -> dict[str, Any]:
    """The source of a split. Held-out scenes are kept once drawn; those of training come once."""
    chosen = {"fields": fields} if fields else {}
    known = {"kind": "scenes", "level": level, "split": split, "cache": split != "train"}
    return {**known, **chosen, **settings}


def finetune(config: ConfigDict, task: str, level: str) -> None:
    """Turns the config of a pre-training into that of a task.

    Raises:
      ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"the task {task!r} is unknown; choose one of {', '.join(TASKS)}.")
    config.total_steps = 4000
    config.eval_every = 2000
    config.checkpoint_every = 2000
    config.optimizer.update({"lr": 3e-4, "warmup_steps": 100})
    with config.objectives.unlocked():
        config.objectives.momentum = 0.0
        config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
        config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
    with config.evals.unlocked():
        del config.evals.retrieval, config.evals.caption
    TASKS[task](config, level)


def caption(config: ConfigDict, level: str) -> None:
    """Cross-entropy on captions, of which the first names everything."""
    config.task = "caption"
    config.finetune.caption.memory = "fused"
    config.total_steps = 2000
    config.eval_every = 1000
    with config.evals.unlocked():
        config.evals.caption = caption_eval(
            scenes(level, "val"), limit=256, max_length=config.data.target_length
        )
    config.checkpoint.best_metric = "caption/cider"


def scst(config: ConfigDict, level: str) -> None:
    """Self-critical training on CIDEr, from ``--config.init_from=`` a run of ``:caption``."""
    caption(config, level)
    config.task = "scst"
    config.total_steps = 200
    config.eval_every = 50
    config.optimizer.update({"lr": 5e-5, "warmup_steps": 10})
    config.finetune.scst.update({"texts": 5, "max_length": config.data.target_length - 1})
    config.batch_size = 16


def _at_length(config: ConfigDict) -> None:
    """For what pre-training never asks: which of the objects a word points at."""
    config.total_steps = 4500
    config.batch_size = 64
    config.eval_every = 1500
    config.optimizer.lr = 1.2e-3


def vqa(config: ConfigDict, level: str) -> None:
    """Questions of colour, shape, size, count, presence and relation."""
    config.task = "vqa"
    config.data.train = (scenes(level, "train", "questions"),)
    config.finetune.vqa.answers = 1
    _at_length(config)
    # The longest question has twelve words, all in the vocabulary.
    config.data.update({"text_length": 14, "target_length": 4})
    with config.evals.unlocked():
        config.evals.vqa = vqa_eval(scenes(level, "val", "questions"), limit=1024, max_length=3)
    config.checkpoint.best_metric = "vqa/accuracy"


def retrieval(config: ConfigDict, level: str) -> None:
    """ITC and ITM alone."""
    config.task = "retrieval"
    config.total_steps = 2000
    config.eval_every = 1000
    config.objectives.mlm.weight = config.objectives.prefix.weight = 0.0
    config.objectives.itm.fraction = 1.0
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(scenes(level, "val"), limit=256, rerank=32)
    config.checkpoint.best_metric = "retrieval/txt_r1"


def grounding(config: ConfigDict, level: str) -> None:
    """Phrases to boxes in coordinates of whole pixels."""
    config.task = "grounding"
    config.data.train = (scenes(level, "train", "phrases"),)
    _at_length(config)
    config.data.text_length = 11  # phrases have nine words at most
    # After 1,000 steps at the easy level 77.4, and with the official weights 71.6. With twice as
    # many bins, which leave more to guess, what a colour points at is learnt in some runs only.
    bins = 1 + config.model.vision.image_size[0]
    config.finetune.grounding.update({"bins": bins, "appended": True, "weighting": "none"})
    with config.evals.unlocked():
        config.evals.grounding = grounding_eval(scenes(level, "val", "phrases"), limit=1024)
    config.checkpoint.best_metric = "grounding/acc@0.5"


def nlvr2(config: ConfigDict, level: str) -> None:
    """A sentence about two pictures, true or false."""
    _classification(config, level, "nlvr2", "pair", classes=2, classified=2)


def snli_ve(config: ConfigDict, level: str) -> None:
    """A hypothesis that a picture entails, leaves open or contradicts."""
    _classification(config, level, "snli_ve", "entailment", classes=3)


def _classification(config: ConfigDict, level: str, task: str, field: str, **model: int) -> None:
    config.task = task
    config.model.update(model)
    config.data.train = (scenes(level, "train", field),)
    source = scenes(level, "val", field, size=512)
    with config.evals.unlocked():
        config.evals[task] = classification_eval(source, limit=512)
    config.checkpoint.best_metric = f"{task}/accuracy"


def _clips(config: ConfigDict, level: str, frames: int = 4) -> dict[str, Any]:
    """Clips of scenes in motion; their tokens are joined, each with its frame's place in time."""
    config.model.update({"frames": frames, "frame_positions": True})
    config.optimizer.lr = 1.2e-3
    config.data.train = (scenes(level, "train", video=True, size=20_000, cache=True),)
    return scenes(level, "val", video=True, size=256)


def video_retrieval(config: ConfigDict, level: str) -> None:
    """Which clip, which sentence: both tell what moves where."""
    retrieval(config, level)
    source = _clips(config, level)
    with config.evals.unlocked():
        config.evals.retrieval = retrieval_eval(source, limit=256, rerank=32)


def video_qa(config: ConfigDict, level: str) -> None:
    """What moves, and which way."""
    vqa(config, level)
    config.total_steps, config.batch_size = 3000, 32
    source = _clips(config, level)
    with config.evals.unlocked():
        config.evals.vqa = vqa_eval(source, limit=768, max_length=3)


def video_caption(config: ConfigDict, level: str) -> None:
    """What moves where, in a sentence."""
    caption(config, level)
    source = _clips(config, level)
    with config.evals.unlocked():
        config.evals.caption = caption_eval(source, limit=256, max_length=config.data.target_length)


TASKS: dict[str, Callable[[ConfigDict, str], None]] = {
    "caption": caption,
    "scst": scst,
    "vqa": vqa,
    "retrieval": retrieval,
    "grounding": grounding,
    "nlvr2": nlvr2,
    "snli_ve": snli_ve,
    "video_retrieval": video_retrieval,
    "video_qa": video_qa,
    "video_caption": video_caption,
}
