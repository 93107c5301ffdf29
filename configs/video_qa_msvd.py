"""Questions about the clips of MSVD with mPLUG-base: as ``video_qa_msrvtt.py``, zero-shot too.

``config.data.root`` holds ``msvd_qa_{train,val,test}.jsonl``, ``msvd_qa_answers.json`` and the
clips in ``videos/``.
"""

from ml_collections import ConfigDict

from configs.video_qa_msrvtt import video_qa

QUESTIONS = 30_933  # of train (Xu et al. 2017)


def get_config() -> ConfigDict:
    """MSVD-QA, whose clips are AVI files."""
    return video_qa("msvd_qa", QUESTIONS, ".avi", published=37.2)
