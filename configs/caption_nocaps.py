"""NoCaps, described by a model that was fine-tuned on COCO captions.

``--config.init_from=`` a run of ``configs/caption_coco.py`` of the same size. Beside COCO's files
``config.data.root`` holds ``nocaps_val_4500_captions.json`` and its pictures in ``nocaps/``.
"""

from ml_collections import ConfigDict

from configs import caption_coco

NOCAPS = {"kind": "captions", "path": "nocaps_val_4500_captions.json", "images": "nocaps"}


def get_config(size: str = "base") -> ConfigDict:
    """The training of ``caption_coco.py``, judged on NoCaps' validation set."""
    config = caption_coco.get_config(size)
    with config.evals.unlocked():
        del config.evals.val, config.evals.test
        config.evals.nocaps = caption_coco.written(NOCAPS)
    config.published = (("nocaps/cider", 114.8),) if size == "large" else ()
    config.checkpoint.best_metric = "nocaps/cider"
    return config
