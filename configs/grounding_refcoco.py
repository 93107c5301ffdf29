"""Visual grounding of mPLUG-large, as REFER publishes the data.

``configs/grounding_refcoco.py:refcoco``, ``:plus`` (RefCOCO+) or ``:g`` (RefCOCOg, UMD's splits).
``config.data.root`` holds REFER's folders ``refcoco/``, ``refcoco+/``, ``refcocog/`` and COCO's
``train2014/``.
"""

from ml_collections import ConfigDict

from configs.official import HEADS, start, train_for
from mplug_jax.config import grounding_eval

# Folder, references, sentences of train (Yu et al. 2016; Mao et al. 2016), held-out splits and
# the paper's Acc@0.5 on them.
DATASETS = {
    "refcoco": ("refcoco", "refs(unc).p", 120_624, {"val": 92.40, "testA": 94.51, "testB": 88.42}),
    "plus": ("refcoco+", "refs(unc).p", 120_191, {"val": 86.02, "testA": 90.17, "testB": 78.17}),
    "g": ("refcocog", "refs(umd).p", 80_512, {"val": 85.88, "test": 86.42}),
}


def get_config(dataset: str = "refcoco") -> ConfigDict:
    """120 epochs; one of BERT's unused tokens a coordinate."""
    if dataset not in DATASETS:
        raise ValueError(
            f"configs/grounding_refcoco.py:{dataset} is unknown; choose {', '.join(DATASETS)}."
        )
    folder, references, sentences, held_out = DATASETS[dataset]
    files = {
        "kind": "refer",
        "path": f"{folder}/{references}",
        "instances": f"{folder}/instances.json",
        "images": "train2014",
    }
    config = start("grounding", "large", ("large",))
    train_for(
        config,
        epochs=120,
        items=sentences,
        batch=24 * 8,
        lr=2e-5,
        vision_lr=5e-6,
        warmup_units=20,
        warmup_lr=1e-6,
        unused=HEADS,
    )
    config.finetune.grounding.update({"bins": 337, "appended": False})
    config.data.train = ({**files, "split": "train"},)
    config.data.text_length = 20
    with config.evals.unlocked():
        for split in held_out:
            config.evals[split] = grounding_eval({**files, "split": split}, limit=0)
    config.published = tuple((f"{split}/acc@0.5", figure) for split, figure in held_out.items())
    config.checkpoint.best_metric = "val/acc@0.5"
    return config
