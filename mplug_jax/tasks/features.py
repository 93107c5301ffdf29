"""A frozen image encoder's tokens of every training picture, computed once, kept in the workdir."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from mplug_jax.config import ConfigError
from mplug_jax.data.examples import load_image
from mplug_jax.data.features import FeatureSource, Pictures
from mplug_jax.data.pipeline import eval_batches
from mplug_jax.data.records import Record, Source
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.models.mplug import MPlug, init_params
from mplug_jax.models.vit import ViT
from mplug_jax.training.checkpoint import load_params
from mplug_jax.training.optimizer import policies
from mplug_jax.training.sharding import batch_parts, data_mesh, place_global_batch, replicated
from mplug_jax.training.state import params_sha256

BATCH_SIZE = 64
ENCODER = "visual_encoder"


class Variants:
    """Evaluation pictures ``[variants, H, W, 3]``: as it is, then mirrored."""

    def __init__(self, size: tuple[int, int], count: int):
        self.transform, self.count = ImageTransform(size, train=False), count

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Raises BadSample where the image cannot be decoded."""
        image = load_image(record, self.transform, rng)
        return {"image": np.stack([image, image[:, ::-1]][: self.count])}


def with_features(
    sources: Sequence[tuple[Source, float]], config: ConfigDict, model: MPlug, workdir: str
) -> list[tuple[Source, float]]:
    """The training sources with ``config.data.cached_variants`` encodings of every picture.

    Raises:
      ConfigError: the image encoder is trained, or no checkpoint says what its weights are.
    """
    encoder = _frozen_encoder(config, model)
    digest = params_sha256(encoder)
    cached = []
    for number, (source, weight) in enumerate(sources):
        pictures = Pictures(source)
        key = hashlib.sha256(f"{digest} {config.data.train[number]} {len(pictures)}".encode())
        name = f"{key.hexdigest()[:16]}-{config.data.cached_variants}.npy"
        path = Path(workdir) / "features" / name
        if jax.process_index() == 0 and not path.exists():
            _write(path, pictures, config.data.cached_variants, model, encoder)
        cached.append((FeatureSource(source, path, pictures.rows), weight))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("image features")
    return cached


def _frozen_encoder(config: ConfigDict, model: MPlug) -> Any:
    """The encoder's parameters, of ``config.init_from``."""
    abstract = nn.meta.unbox(
        jax.eval_shape(lambda rng: init_params(model.config, rng), jax.random.key(0))
    )
    trained = policies(abstract, config.optimizer.to_dict())[ENCODER]
    if not all(policy.freeze for policy in jax.tree.leaves(trained)):
        raise ConfigError(
            "config.data.cached_variants keeps the image encoder's output, so the encoder must be "
            f"frozen: add ('^{ENCODER}/', {{'freeze': True}}) to config.optimizer.rules."
        )
    if not config.init_from:
        raise ConfigError(
            "config.data.cached_variants needs config.init_from: a frozen image encoder takes its "
            "weights from a checkpoint (python -m mplug_jax.convert makes one of other weights)."
        )
    encoder = {ENCODER: abstract[ENCODER]}
    grid = model.config.vision.grid
    return load_params(config.init_from, encoder, grid, part=ENCODER)[0][ENCODER]


def _write(path: Path, pictures: Pictures, count: int, model: MPlug, encoder: Any) -> None:
    """Encodes every picture into ``path``, which appears once it is whole.

    One process does it, on the devices it has for itself.
    """
    vision = model.config.vision
    mesh = data_mesh(jax.local_devices())
    tokens = 1 + vision.grid[0] * vision.grid[1]

    vit = ViT(vision, model.config.compute_dtype)

    def encode(params: Any, images: jax.Array) -> jax.Array:
        x = vit.apply({"params": params}, images.reshape(-1, *images.shape[2:]))
        return x.reshape(*images.shape[:2], *x.shape[1:]).astype("float16")

    encode = jax.jit(encode, out_shardings=replicated(mesh))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    shape = (len(pictures), count, tokens, vision.width)
    print(f"encoding {len(pictures)} pictures once into {path}", flush=True)
    array = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    array[:, 0, 0, 0] = np.nan
    rows = -(-BATCH_SIZE // batch_parts(mesh)) * batch_parts(mesh)
    with tqdm(total=len(pictures), unit="image") as bar:
        for batch in eval_batches(pictures, Variants(vision.image_size, count), rows):
            placed = place_global_batch({"image": batch["image"]}, mesh)["image"]
            valid = batch["valid"]
            array[batch["index"][valid]] = np.asarray(encode(encoder, placed))[valid]
            bar.update(int(valid.sum()))
    array.flush()
    os.replace(partial, path)
