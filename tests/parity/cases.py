"""One golden case of the official implementation: its files, and our model with its weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.conversion.official import export_params, import_params, rename
from mplug_jax.conversion.official_sizes import model_config_from
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import MPlug

# The mlm cases hold the fusion network and a decoder alone, under names of their own.
MLM_NAMES = {
    "fusion_mlm.bert.embeddings.": "text_encoder.embeddings.",
    "fusion_mlm.bert.": "fusion_encoder.",
    "fusion_mlm.cls.": "fusion_encoder.cls.",
    "prefix.": "text_decoder.",
}
MLM_GRADIENT_NAMES = {
    "text_encoder.embeddings.": "bert.embeddings.",
    "fusion_encoder.encoder.": "bert.encoder.",
    "fusion_encoder.cls.": "cls.",
}
NO_TOWERS = ModelConfig().replace(
    vision={"image_size": (32, 32), "width": 48, "depth": 1, "heads": 1, "mlp_dim": 8},
    text={"depth": 1},
)
CARRIED = Path(__file__).parent / "goldens"
SPECIAL = {"cls_id": 101, "sep_id": 102, "pad_id": 0}


def folders(root: str | None) -> list[Path]:
    """The cases under a folder, the carried ones by default."""
    found = sorted(p.parent for p in Path(root or CARRIED).glob("*/outputs.npz"))
    if not found:
        raise FileNotFoundError(f"--goldens={root}: no <case>/outputs.npz in it")
    return found


class Case:
    """A folder with config.json, inputs.npz, weights.npz and outputs.npz; ``misc`` has no weights.

    Attributes:
      kind: 'caption', 'vatex', 'vqa', 'grounding', 'retrieval', 'mlm' or 'misc'.
      settings: the case's config.json.
      inputs, outputs, weights: arrays by their official names.
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        self.inputs, self.outputs = _arrays(folder / "inputs.npz"), _arrays(folder / "outputs.npz")
        file = folder / "config.json"
        self.settings = json.loads((file if file.exists() else folder / "golden.json").read_text())
        self.kind = self.settings.get("kind", "misc")
        self.weights = {} if self.kind == "misc" else _arrays(folder / "weights.npz")
        if self.kind == "mlm":
            self.weights = rename(self.weights, MLM_NAMES)

    @functools.cached_property
    def config(self) -> Any:
        """Our model's config, read off the tensors; what they don't show is taken from the case."""
        bert = self.settings["bert"]
        config = model_config_from(
            self.weights,
            like=NO_TOWERS if self.kind == "mlm" else None,
            vision_heads=self.settings["vision_heads"],
            text_heads=bert["num_attention_heads"],
            image_size=self.settings.get("image_res"),
            fusion_depth=bert["fusion_layers"],
            fusion_stride=bert["stride_layer"],
        )
        text = {"dropout": 0.0, "attention_dropout": 0.0}
        if "n_text_layers_kept" in self.settings:
            # Official mistake: grounding cuts the text encoder to its first `stride` layers.
            text["depth"] = self.settings["n_text_layers_kept"]
        return config.replace(vision={"attention_dropout": 0.0}, text=text, temperature_range=None)

    @functools.cached_property
    def model(self) -> MPlug:
        return MPlug(self.config)

    @functools.cached_property
    def params(self) -> Any:
        return self.imported("")

    def imported(self, suffix: str) -> Any:
        """Our parameters; with suffix '_m' those of the momentum model."""
        return import_params(self.weights, self.config, suffix=suffix)[0]

    def official_names(self, tree: Any) -> dict[str, np.ndarray]:
        """Parameters or gradients under the official names."""
        layers = self.settings["bert"]["num_hidden_layers"]
        named = export_params(jax.device_get(tree), self.config, fusion_layers=layers)
        return rename(named, MLM_GRADIENT_NAMES) if self.kind == "mlm" else named

    def apply(self, params: Any, method: Any, *args: Any) -> Any:
        """Applies a method of the model, by its name or as a function of the module."""
        return self.model.apply({"params": params}, *args, method=method)

    @functools.cached_property
    def image(self) -> np.ndarray:
        """Normalised pictures ``[B, H, W, 3]``, frames of videos ``[B, T, H, W, 3]``."""
        pixels = self.inputs["image"] if "image" in self.inputs else self.inputs["video"]
        return channels_last(pixels)

    def text(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Ids and mask of ``<name>_ids``."""
        return ids_of(self.inputs[f"{name}_ids"]), jnp.asarray(self.inputs[f"{name}_mask"], bool)


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """``[..., 3, H, W]`` to ``[..., H, W, 3]``."""
    return np.moveaxis(pixels, -3, -1)


def ids_of(array: np.ndarray) -> jax.Array:
    """Token ids as we hold them."""
    return jnp.asarray(array, jnp.int32)
