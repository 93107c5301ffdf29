"""CLIP and DINOv2 files against the outputs of Hugging Face's own modules.

``fixtures/{clip,dinov2,bert}.{safetensors,npz}`` were made with transformers 5.24 and torch 2.13::

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, patch_size=4,
                 image_size=12)
    image = torch.randn(2, 3, 12, 12)
    clip = CLIPModel(CLIPConfig(
        vision_config=dict(intermediate_size=24, **sizes),
        text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, vocab_size=9, max_position_embeddings=5),
        projection_dim=6))
    dinov2 = Dinov2Model(Dinov2Config(mlp_ratio=2, **sizes))
    bert = BertForPreTraining(BertConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=11))

with each parameter drawn anew as 0.3 * randn, plus 1 for norm scales and layer scales, in the order
clip, dinov2, bert; saved by ``save_pretrained``. Outputs: of CLIP, ``post_layernorm`` of
``vision_model(image).last_hidden_state`` (CLIP normalises the class token alone); of DINOv2,
``last_hidden_state``; of BERT, the last hidden states and ``prediction_logits``.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mplug_jax.conversion.reading import read_weights
from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.transfer import Filling
from mplug_jax.conversion.vision import fill_image_encoder
from mplug_jax.models.config import (
    DINOV2,
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from mplug_jax.models.vit import ViT

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"image_size": (12, 12), "patch_size": (4, 4), "width": 16, "depth": 2, "heads": 2}
CLIP = VisionConfig(mlp_dim=24, **SIZES)
DINO = VisionConfig(mlp_dim=32, **SIZES, **DINOV2)


def model(vision: VisionConfig) -> ModelConfig:
    return ModelConfig(
        vision=vision,
        text=TextConfig(vocab_size=9, width=16, depth=1, heads=2, mlp_dim=8, max_positions=4),
        fusion=FusionConfig(depth=2, stride=1),
        decoder=DecoderConfig(depth=1),
        embed_dim=4,
    )


def openai_names(tensors):
    """What OpenAI's file of the same model would hold: its q, k, v are one array."""
    state = {"logit_scale": tensors["logit_scale"], "visual.proj": np.zeros((16, 6))}
    state |= {"transformer.resblocks.0.ln_1.weight": np.ones(8), "positional_embedding": np.ones(3)}
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        names |= {f"{theirs}.{end}": f"{ours}.{end}" for end in ("weight", "bias")}
    for i in range(2):
        theirs, ours = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for end in ("weight", "bias"):
            for new, old in (
                ("ln_1.", "layer_norm1."),
                ("ln_2.", "layer_norm2."),
                ("mlp.c_fc.", "mlp.fc1."),
                ("mlp.c_proj.", "mlp.fc2."),
                ("attn.out_proj.", "self_attn.out_proj."),
            ):
                names[f"{theirs}{new}{end}"] = f"{ours}{old}{end}"
            state[f"visual.{theirs}attn.in_proj_{end}"] = np.concatenate(
                [tensors[f"vision_model.{ours}self_attn.{n}_proj.{end}"] for n in "qkv"]
            )
    state |= {f"visual.{k}": tensors[f"vision_model.{v}"] for k, v in names.items()}
    return state


@pytest.mark.parametrize(
    ("name", "vision", "change"),
    [
        ("clip", CLIP, lambda tensors: tensors),
        ("clip", CLIP, openai_names),
        ("dinov2", DINO, lambda tensors: tensors),
        ("dinov2", DINO, lambda tensors: {f"backbone.{n}": a for n, a in tensors.items()}),
    ],
    ids=["clip", "openai", "dinov2", "prefixed"],
)
def test_tokens_are_those_of_the_original_module(name, vision, change):
    filling = Filling(model(vision))
    tensors = change(read_weights(FIXTURES / f"{name}.safetensors").tensors)
    report = fill_image_encoder(filling, tensors)
    report.expect()
    filling.settle(report, "not given")
    assert not any(place.startswith("visual_encoder") for place in report.initial)
    params = filling.complete(0)["visual_encoder"]
    outputs = np.load(FIXTURES / f"{name}.npz")
    image = outputs["image"].transpose(0, 2, 3, 1)
    got = jax.jit(ViT(vision).apply)({"params": params}, image)
    np.testing.assert_allclose(got, outputs["tokens"], atol=2e-5)


def test_the_text_tower_and_the_projections_are_left_with_a_reason():
    filling = Filling(model(CLIP))
    report = fill_image_encoder(filling, read_weights(FIXTURES / "clip.safetensors").tensors)
    reasons = set(report.unused.values())
    assert reasons == {"CLIP's text tower", "CLIP's output projection, not used"}
    assert "visual_projection.weight" in report.unused


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"width": 24, "heads": 2}, "vision.width: 16 in the file, 24 in the config"),
        ({"patch_size": (2, 2)}, r"vision.patch_size: \(4, 4\) in the file, \(2, 2\)"),
        ({"depth": 3}, "vision.depth: 2 in the file, 3 in the config"),
        ({"activation": "quick_gelu"}, "vision.activation: gelu in the file, quick_gelu in the"),
        ({"ln_eps": 1e-5}, "vision.ln_eps: 1e-06 in the file, 1e-05 in the config"),
        ({"pre_norm": True}, "vision.pre_norm: False in the file, True in the config"),
        ({"image_mean": (0.5,) * 3}, r"vision.image_mean: \(0.485, .* in the file, \(0.5, "),
        ({"layer_scale": 0.0}, "vision.layer_scale"),
    ],
)
def test_a_config_of_another_encoder_is_refused(vision, message):
    config = model(DINO).replace(vision=vision)
    with pytest.raises(ConversionError, match=message):
        fill_image_encoder(Filling(config), read_weights(FIXTURES / "dinov2.safetensors").tensors)


def test_a_file_without_an_image_encoder_is_refused():
    with pytest.raises(ConversionError, match=r"no image encoder that is known.*OpenAI CLIP"):
        fill_image_encoder(Filling(model(CLIP)), {"bert.encoder": np.zeros(1)})


def test_positions_are_resampled_for_the_config_s_picture():
    config = model(DINO).replace(vision={"image_size": (20, 8)})
    filling = Filling(config)
    tensors = read_weights(FIXTURES / "dinov2.safetensors").tensors
    report = fill_image_encoder(filling, tensors)
    report.expect()
    assert "from (3, 3) patches to (5, 2)" in report.resized["embeddings.position_embeddings"]
    table = filling.complete(0)["visual_encoder"]["position_embedding"]
    assert table.shape == (11, 16)
    np.testing.assert_array_equal(table[0], tensors["embeddings.position_embeddings"][0, 0])


def test_an_unknown_tensor_fails():
    tensors = read_weights(FIXTURES / "dinov2.safetensors").tensors
    tensors["embeddings.register_tokens"] = np.zeros((1, 4, 16), np.float32)
    report = fill_image_encoder(Filling(model(DINO)), tensors)
    with pytest.raises(ConversionError, match=r"not in the model: embeddings\.register_tokens"):
        report.expect()
