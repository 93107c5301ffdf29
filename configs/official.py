"""What the official fine-tuning recipes share; no experiment of its own.

Rates, epochs, warm-up, batches and image sides are those of the released mPLUG configs. The sizes
of the datasets are their published ones, since an official epoch is one pass over the annotations.
"""

from ml_collections import ConfigDict

from mplug_jax.config import NO_DECAY, defaults

SIDES = {"base": 384, "large": 336}
# One item a caption, as the official readers of COCO and Flickr30K count.
COCO_CAPTIONS = 566_747  # Karpathy's train and restval: 113,287 pictures
FLICKR30K_CAPTIONS = 145_000  # Karpathy's train: 29,000 pictures
# Parts that only pre-training or retrieval use.
HEADS = ("mlm_head", "vision_proj", "text_proj", "itm_head", "temperature")


def start(task: str, size: str, sizes: tuple[str, ...] = ("base", "large")) -> ConfigDict:
    """Settings of a size without a teacher, in float32 and without clipping.

    ``config.data.root`` holds BERT's ``vocab.txt`` beside the annotations.

    Raises:
      ValueError: a size that is none of ``sizes``.
    """
    if size not in sizes:
        raise ValueError(f"the size {size!r} is unknown; choose {' or '.join(sizes)}.")
    config = defaults(size)
    config.task = task
    config.model.vision.image_size = (SIDES[size], SIDES[size])
    config.model.remat = "dots_no_batch"
    config.optimizer.clip_norm = 0.0
    config.data.crop_scale = (0.5, 1.0)
    config.data.workers = 16
    config.objectives.momentum = 0.0
    config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
    return config


def train_for(
    config: ConfigDict,
    *,
    epochs: int,
    items: int,
    batch: int,
    lr: float,
    vision_lr: float,
    warmup_units: int,
    warmup_lr: float = 1e-5,
    min_lr: float = 1e-6,
    accumulate: int = 1,
    unused: tuple[str, ...] = (),
) -> None:
    """Sets batch, steps and optimizer: ``vision_lr`` for the image encoder, ``lr`` for the rest.

    Args:
      items: of an epoch, whose last incomplete batch is dropped.
      batch: of an update: per device x devices x official accumulation.
      warmup_units: of 100 official iterations, ``accumulate`` of which make an update.
      unused: parts without a gradient. PyTorch's AdamW skips them; here they would decay.
    """
    steps_per_epoch = max(items // batch, 1)
    config.batch_size, config.accumulate = batch, accumulate
    config.total_steps = epochs * steps_per_epoch
    config.eval_every = config.checkpoint_every = steps_per_epoch
    rates = {"lr": lr, "warmup_lr": warmup_lr, "min_lr": min_lr}
    config.optimizer.update({**rates, "schedule": "official"})
    config.optimizer.official.update({"epochs": epochs, "warmup_units": warmup_units})
    config.optimizer.official.update({"steps_per_epoch": steps_per_epoch})
    config.optimizer.official.iterations_per_step = accumulate
    frozen = ((rf"^({'|'.join(unused)})(/|$)", {"freeze": True}),) if unused else ()
    # The official list decays CLIP's norms: mplug_jax.config.OFFICIAL_NO_DECAY in place of this.
    config.optimizer.rules = (("^visual_encoder/", {"lr": vision_lr}), *frozen, NO_DECAY)
