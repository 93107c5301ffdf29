"""Mistakes in a model's config, and the named sizes."""

import dataclasses

import pytest

from mplug_jax.models.config import (
    PRESETS,
    REMAT_POLICIES,
    SCHEDULES,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    preset,
)


@pytest.mark.parametrize(
    ("build", "name", "choices"),
    [
        (
            lambda: ModelConfig(fusion=FusionConfig(schedule="papr")),
            "fusion.schedule='papr'",
            SCHEDULES,
        ),
        (lambda: ModelConfig(dtype="float16"), "dtype='float16'", ("float32", "bfloat16")),
        (lambda: ModelConfig(remat="some"), "remat='some'", REMAT_POLICIES),
        (lambda: ModelConfig(text=TextConfig(norm="both")), "text.norm='both'", ("post", "pre")),
        (
            lambda: ModelConfig(vision=VisionConfig(stem="mlp")),
            "vision.stem='mlp'",
            ("patch", "conv"),
        ),
        (
            lambda: ModelConfig(vision=VisionConfig(activation="relu")),
            "vision.activation='relu'",
            ("quick_gelu", "gelu"),
        ),
        (lambda: preset("huge"), "preset='huge'", tuple(PRESETS)),
    ],
)
def test_an_unknown_name_lists_the_choices(build, name, choices):
    with pytest.raises(ValueError) as error:
        build()
    assert f"config.model.{name} is unknown" in str(error.value)
    assert str(error.value).endswith(f"choose one of: {', '.join(choices)}.")


@pytest.mark.parametrize(
    ("image_size", "patch_size", "axis"),
    [
        ((224, 224), (15, 16), "height"),
        ((224, 224), (16, 15), "width"),
        ((8, 8), (16, 8), "height"),
        ((8, 8), (8, 0), "width"),
    ],
)
def test_a_patch_must_divide_the_image(image_size, patch_size, axis):
    with pytest.raises(ValueError, match=rf"does not divide .* in {axis}"):
        ModelConfig(vision=VisionConfig(image_size=image_size, patch_size=patch_size))


@pytest.mark.parametrize("patch_size", [(8, 4), (6, 6), (1, 1)])
def test_the_convolutional_stem_needs_a_power_of_two(patch_size):
    with pytest.raises(ValueError, match="power of two"):
        ModelConfig(vision=VisionConfig(image_size=(24, 24), patch_size=patch_size, stem="conv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"heads": 7}}, "vision.width=768 is not a multiple of vision.heads=7"),
        ({"text": {"heads": 0}}, "text.width=768 is not a multiple of text.heads=0"),
        ({"fusion": {"stride": 0}}, "fusion.stride must be at least 1, got 0"),
        ({"fusion": {"depth": 0}}, "fusion.depth must be at least 1"),
        ({"decoder": {"depth": -1}}, "decoder.depth must be at least 1"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
        ({"scan_unroll": 0}, "scan_unroll must be at least 1"),
    ],
)
def test_impossible_numbers_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig().replace(**changes)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layer_scale": -0.1}, "layer_scale must be 0 .* got -0.1"),
        ({"stem": "conv", "patch_bias": True}, "patch_bias belongs to the patch convolution"),
    ],
)
def test_settings_of_dinov2_that_cannot_be(vision, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig().replace(vision=vision)


def test_replace_changes_a_nested_field_and_nothing_else():
    base = preset("base")
    changed = base.replace(vision={"image_size": (384, 320)}, dtype="bfloat16")
    assert changed.vision.grid == (24, 20) and changed.dtype == "bfloat16"
    restored = changed.replace(vision={"image_size": base.vision.image_size}, dtype=base.dtype)
    assert restored == base
    with pytest.raises(TypeError):
        base.replace(fusion={"strides": 2})


def test_presets_have_the_released_sizes():
    base, large = preset("base"), preset("large")
    assert base.vision.patch_size == (16, 16) and large.vision.patch_size == (14, 14)
    sizes = [(c.vision.width, c.vision.depth, c.vision.heads) for c in (base, large)]
    assert sizes == [(768, 12, 12), (1024, 24, 16)]
    assert (base.fusion.stride, large.fusion.stride) == (3, 6)
    assert base.text == large.text == TextConfig()
    text = dataclasses.asdict(base.text)
    expected = {"vocab_size": 30522, "width": 768, "depth": 6, "heads": 12, "mlp_dim": 3072}
    assert expected.items() <= text.items()
    assert preset("small").text.width == 384
