"""Downstream tasks on photographs, ``--config.init_from=`` a run of ``configs/flickr8k.py:small``.

``configs/photo_tasks.py:<task>`` reads, under ``--config.data.root=<folder>``:

- ``caption``: Flickr8k's ``train.json`` and ``val.json``, as its pre-training;
- ``grounding``: ``grounding_train.json``, ``grounding_val.json``, ``[{"image", "phrase", "box"}]``;
- ``vqa``: DAQUAR's ``train.json`` and ``val.json``, ``[{"image", "question", "answer"}]``;
- ``video_caption``, ``video_retrieval``: ``train.json`` and ``val.json``, ``[{"video",
  "captions"}]``, each clip a folder of frames.

BERT's ``vocab.txt`` lies in the folder, too.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.flickr8k import TRAIN, VAL
from configs.flickr8k import get_config as flickr8k
from mplug_jax.config import caption_eval, grounding_eval, retrieval_eval, vqa_eval


def get_config(task: str = "caption") -> ConfigDict:
    """The fine-tuning of a task.

    Raises:
      ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"configs/photo_tasks.py:{task} is unknown; choose {', '.join(TASKS)}.")
    config = flickr8k("small")
    config.total_steps = 350
    config.batch_size = 32
    config.checkpoint_every = 100
    config.optimizer.warmup_steps = 20
    with config.evals.unlocked():
        del config.evals.retrieval, config.evals.caption
        TASKS[task](config)
    return config


def caption(config: ConfigDict) -> None:
    """Captions of photographs; the decoder reads the photo fused with the empty text."""
    config.task = "caption"
    config.finetune.caption.memory = "fused"
    config.data.train = (TRAIN,)
    config.evals.caption = caption_eval(VAL, limit=1000, max_length=20)
    config.checkpoint.best_metric = "caption/cider"


def grounding(config: ConfigDict) -> None:
    """The box of a phrase, in 113 coordinates, one a pixel."""
    config.task = "grounding"
    config.finetune.grounding.update({"bins": 113, "weighting": "none"})
    config.batch_size = 64
    config.total_steps = 300
    config.data.text_length = 12
    train, val = ({"kind": "grounding", "path": f"grounding_{s}.json"} for s in ("train", "val"))
    config.data.train = (train,)
    config.evals.grounding = grounding_eval(val, limit=2000)
    config.checkpoint.best_metric = "grounding/acc@0.5"


def vqa(config: ConfigDict) -> None:
    """Questions about rooms."""
    config.task = "vqa"
    config.finetune.vqa.answers = 1
    config.total_steps = 1200
    config.data.update({"text_length": 18, "target_length": 5})
    config.data.train = ({"kind": "vqa", "path": "train.json"},)
    config.evals.vqa = vqa_eval({"kind": "vqa", "path": "val.json"}, limit=0, max_length=5)
    config.checkpoint.best_metric = "vqa/accuracy"


def _clips(config: ConfigDict) -> dict[str, str]:
    config.model.frames = 4
    config.total_steps = 60
    config.batch_size = 16
    config.data.update({"flip": False, "cached_variants": 0})
    config.data.train = ({"kind": "video", "path": "train.json"},)
    return {"kind": "video", "path": "val.json"}


def video_caption(config: ConfigDict) -> None:
    """Sentences about clips of four frames."""
    caption(config)
    val = _clips(config)
    config.evals.caption = caption_eval(val, limit=0, max_length=20)


def video_retrieval(config: ConfigDict) -> None:
    """Clips and their sentences by ITC and ITM."""
    config.task = "retrieval"
    config.objectives.mlm.weight = config.objectives.prefix.weight = 0.0
    val = _clips(config)
    config.evals.retrieval = retrieval_eval(val, limit=0, rerank=16, score="itm+itc")
    config.checkpoint.best_metric = "retrieval/r_mean"


TASKS: dict[str, Callable[[ConfigDict], None]] = {
    "caption": caption,
    "grounding": grounding,
    "vqa": vqa,
    "video_caption": video_caption,
    "video_retrieval": video_retrieval,
}
