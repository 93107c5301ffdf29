"""Shapes of the model: one frozen dataclass a part, and the named presets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SCHEDULES = ("paper", "official", "connected", "co_attention", "asymmetric")
REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """CLIP's ViT (facts: patch convolution without bias, pre-LN, QuickGELU, class token).

    ``stem='conv'`` replaces the patch convolution by a ladder of 3x3 stride-2 convolutions with
    the same output grid (Xiao et al. 2021, "Early convolutions help transformers see better"):
    for models trained from scratch on little data; the released weights use ``'patch'``.
    ``qk_norm``: queries and keys are normalised, see ``layers.Attention``.

    The fields that make it DINOv2's instead (see ``DINOV2``): ``pre_norm``, a LayerNorm before the
    blocks; ``patch_bias``, a bias of the patch convolution; ``layer_scale``, the initial factor on
    each residual branch, 0 for none.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    attention_dropout: float = 0.1
    activation: str = "quick_gelu"
    stem: str = "patch"
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: float = 0.0
    qk_norm: bool = False
    ln_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at ``image_size``."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )


# What DINOv2's ViT has where CLIP's differs: ``VisionConfig(**DINOV2)``, or in a config file
# ``config.model.vision.update(DINOV2)``. Its mean and deviation are ImageNet's.
DINOV2: dict[str, Any] = {
    "pre_norm": False,
    "patch_bias": True,
    "layer_scale": 1.0,
    "activation": "gelu",
    "ln_eps": 1e-6,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """BERT's shape, shared by the text encoder, the fusion network and the decoder.

    ``norm='post'`` is BERT's order; ``'pre'`` normalises each sub-layer's input and closes a
    stack with a LayerNorm: it needs no warm-up to speak of, for small models from scratch.
    ``cross_gain`` scales the initial values and outputs of cross-attention: at first it brings a
    mean over all image tokens, small beside the text stream that it is added to. ``qk_norm``
    normalises queries and keys (``layers.Attention``), so that attention may become as sharp as it
    has to: small models from scratch bind words to objects sooner.
    """

    vocab_size: int = 30522
    width: int = 768
    depth: int = 6
    heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm: str = "post"
    ln_eps: float = 1e-12
    init_std: float = 0.02
    cross_gain: float = 1.0
    qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Depth and schedule of the skip-connected fusion network (see ``models/fusion.py``)."""

    depth: int = 6
    schedule: str = "official"
    stride: int = 3


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Depth of the causal decoder."""

    depth: int = 12


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the parameter tree and the forward pass.

    Attributes:
      embed_dim: width of the ITC space.
      bridge: a linear layer and a norm between image encoder and fusion (official ``visn_fc``)
        even where their widths agree; where they differ it is always there.
      frames: pictures that make one input: 1, or the frames of a clip, whose tokens are joined.
      frame_positions: whether a frame's tokens get a learned embedding of its place in the clip,
        zero at first. Without it, as in the official code, the order of frames is lost.
      classes: of the classifier over the fused text, 0 for none.
      classified: fused texts a decision is made from: 1, or one for each picture (NLVR2: 2).
      temperature: initial ITC temperature.
      temperature_range: (low, high) the temperature is clipped to in use, or None: the official
        code never clips it.
      dtype: compute type, 'float32' or 'bfloat16'; parameters, norms, softmax and losses stay
        in float32.
      remat: what the backward pass recomputes, one of ``REMAT_POLICIES``.
      scan_unroll: layers unrolled per scan iteration; parameters are stacked either way.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    decoder: DecoderConfig = DecoderConfig()
    embed_dim: int = 256
    bridge: bool = False
    frames: int = 1
    frame_positions: bool = False
    classes: int = 0
    classified: int = 1
    temperature: float = 0.07
    temperature_range: tuple[float, float] | None = (0.001, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        _check_vision(self.vision)
        _check_text(self.text)
        _choice("model.fusion.schedule", self.fusion.schedule, SCHEDULES)
        _choice("model.dtype", self.dtype, DTYPES)
        _choice("model.remat", self.remat, REMAT_POLICIES)
        for name, value in (
            ("model.fusion.depth", self.fusion.depth),
            ("model.fusion.stride", self.fusion.stride),
            ("model.decoder.depth", self.decoder.depth),
            ("model.embed_dim", self.embed_dim),
            ("model.frames", self.frames),
            ("model.classified", self.classified),
            ("model.scan_unroll", self.scan_unroll),
        ):
            _positive(name, value)
        if self.frame_positions and self.frames == 1:
            raise ValueError(
                "config.model.frame_positions=True tells the frames of a clip apart, and "
                "config.model.frames=1 makes the model take pictures: change one of them."
            )

    @property
    def bridged(self) -> bool:
        """Whether there is a bridge."""
        return self.bridge or self.vision.width != self.text.width

    @property
    def compute_dtype(self) -> Any:
        """The jnp type of activations."""
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with fields changed; a nested part takes a dict of its own fields."""
        parts = {
            name: dataclasses.replace(getattr(self, name), **value)
            if isinstance(value, dict)
            else value
            for name, value in changes.items()
        }
        return dataclasses.replace(self, **parts)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"config.{name} must be at least 1, got {value}.")


def _choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(
            f"config.{name}={value!r} is unknown; choose one of: {', '.join(choices)}."
        )


def _check_vision(vision: VisionConfig) -> None:
    for axis, size, patch in zip(
        ("height", "width"), vision.image_size, vision.patch_size, strict=True
    ):
        if patch < 1 or size < patch or size % patch:
            raise ValueError(
                f"config.model.vision.patch_size={tuple(vision.patch_size)} does not divide "
                f"image_size={tuple(vision.image_size)} in {axis}: {size} px is not a multiple of "
                f"{patch} px. Choose a patch that divides the image."
            )
    _choice("model.vision.stem", vision.stem, ("patch", "conv"))
    _choice("model.vision.activation", vision.activation, ("quick_gelu", "gelu"))
    if vision.layer_scale < 0:
        raise ValueError(
            "config.model.vision.layer_scale must be 0 (none) or positive, got "
            f"{vision.layer_scale}."
        )
    if vision.stem == "conv" and vision.patch_bias:
        raise ValueError(
            "config.model.vision.patch_bias belongs to the patch convolution, which stem='conv' "
            "replaces: set it to False."
        )
    if vision.stem == "conv" and (
        vision.patch_size[0] != vision.patch_size[1]
        or vision.patch_size[0] & (vision.patch_size[0] - 1)
        or vision.patch_size[0] < 2
    ):
        raise ValueError(
            "config.model.vision.stem='conv' halves the picture step by step, so the patch must "
            f"be square and a power of two of at least 2, got {tuple(vision.patch_size)}."
        )
    _heads("vision", vision.width, vision.heads)


def _check_text(text: TextConfig) -> None:
    _choice("model.text.norm", text.norm, ("post", "pre"))
    _heads("text", text.width, text.heads)


def _heads(part: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(
            f"config.model.{part}.width={width} is not a multiple of {part}.heads={heads}."
        )


_SQUARE_14 = {"patch_size": (14, 14)}
PRESETS: dict[str, ModelConfig] = {
    # facts section 1: the released models.
    "base": ModelConfig(vision=VisionConfig(image_size=(256, 256))),
    "large": ModelConfig(
        vision=VisionConfig(width=1024, depth=24, heads=16, mlp_dim=4096, **_SQUARE_14),
        fusion=FusionConfig(stride=6),
    ),
    # Sizes of DINOv2 ViT-S/14 and MiniLM-L6-H384, whose widths agree.
    "small": ModelConfig(
        vision=VisionConfig(width=384, depth=12, heads=6, mlp_dim=1536, **_SQUARE_14),
        text=TextConfig(width=384, depth=6, heads=12, mlp_dim=1536),
        decoder=DecoderConfig(depth=6),
    ),
    "tiny": ModelConfig(
        vision=VisionConfig(
            image_size=(32, 32),
            patch_size=(8, 8),
            width=96,
            depth=3,
            heads=3,
            mlp_dim=384,
            stem="conv",
            attention_dropout=0.0,
        ),
        text=TextConfig(
            vocab_size=256,
            width=96,
            depth=2,
            heads=3,
            mlp_dim=384,
            max_positions=64,
            norm="pre",
            init_std=0.1,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        fusion=FusionConfig(depth=3, schedule="paper", stride=2),
        decoder=DecoderConfig(depth=2),
        embed_dim=64,
    ),
}


def preset(name: str) -> ModelConfig:
    """The model of a given size; see ``PRESETS``."""
    _choice("model.preset", name, PRESETS)
    return PRESETS[name]
