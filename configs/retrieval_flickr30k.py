"""Image-text retrieval on Flickr30K, Karpathy's splits.

``configs/retrieval_flickr30k.py:large`` or ``:base``, as in ``retrieval_coco.py``.
``config.data.root`` holds ``dataset_flickr30k.json`` and the pictures in ``flickr30k-images/``.
The zero-shot figures are this config's evaluators on a checkpoint that never saw Flickr30K.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.official import FLICKR30K_CAPTIONS, start
from configs.retrieval_coco import finetune, karpathy
from mplug_jax.config import retrieval_eval


def flickr30k(split: str) -> dict[str, Any]:
    """The captions of one of Karpathy's splits."""
    return karpathy("dataset_flickr30k.json", split, images="flickr30k-images")


def get_config(size: str = "large") -> ConfigDict:
    """Eight epochs; the 256 best of ITC are ranked again."""
    config = start("retrieval", size)
    finetune(config, FLICKR30K_CAPTIONS, 128 * 8)
    config.data.train = (flickr30k("train"),)
    with config.evals.unlocked():
        for split in ("val", "test"):
            config.evals[split] = retrieval_eval(flickr30k(split), limit=0, rerank=256, captions=5)
    if size == "large":
        config.published = (("test/txt_r1", 97.6), ("test/img_r1", 88.4))
    config.checkpoint.best_metric = "val/r_mean"
    return config
