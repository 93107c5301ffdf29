"""Questions about the clips of MSRVTT with mPLUG-base, zero-shot or fine-tuned.

Zero-shot: the evaluator on a run of ``vqa_v2.py:base`` or a pre-trained checkpoint. The official
code never fine-tunes on clips; batch and epochs here are ours, the rates those of VQA.
``config.data.root`` holds ``msrvtt_qa_{train,val,test}.jsonl``, lines of ``{video_id, question,
answer}``, ``msrvtt_qa_answers.json``, the list of candidates, and the clips in ``videos/``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import HEADS, start, train_for
from mplug_jax.config import vqa_eval

QUESTIONS = 158_581  # of train (Xu et al. 2017)


def video_qa(dataset: str, questions: int, extension: str, published: float) -> ConfigDict:
    """16 frames of 480 px a clip, whose tokens are joined; candidates are ranked."""

    def clips(split: str) -> dict[str, Any]:
        files = {"path": f"{dataset}_{split}.jsonl", "videos": "videos", "extension": extension}
        return {"kind": "video", **files}

    config = start("vqa", "base")
    train_for(
        config,
        epochs=5,
        items=questions,
        batch=128,
        lr=3e-5,
        vision_lr=5e-6,
        warmup_units=4,
        unused=HEADS,
    )
    config.optimizer.clip_norm = 1.0
    config.model.dtype = "bfloat16"
    config.model.frames = 16
    config.model.vision.image_size = (480, 480)
    config.finetune.vqa.answers = 1
    config.data.train = (clips("train"),)
    config.data.update({"text_length": 30, "target_length": 10})
    with config.evals.unlocked():
        for split in ("val", "test"):
            config.evals[split] = vqa_eval(
                clips(split),
                limit=0,
                answers="rank",
                answer_list=f"{dataset}_answers.json",
                rank=128,
            )
    config.published = (("test/accuracy", published),)  # zero-shot
    config.checkpoint.best_metric = "val/accuracy"
    return config


def get_config() -> ConfigDict:
    """MSRVTT-QA."""
    return video_qa("msrvtt_qa", QUESTIONS, ".mp4", published=21.1)
