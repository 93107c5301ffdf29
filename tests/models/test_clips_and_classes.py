"""Clips, whose frames are one input, and the classifier over fused texts."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax.models.mplug import MPlug, init_params

RNG = np.random.default_rng(0)


def test_a_clip_is_the_tokens_of_its_frames(small, params_of):
    config = small.replace(frames=3)
    params, clip = params_of(config), RNG.normal(size=(2, 3, 8, 18, 3)).astype(np.float32)

    def encode(params, image):
        model = MPlug(config)
        embeds = model.apply({"params": params}, image, method="encode_image")
        return embeds, model.apply({"params": params}, embeds, method="project_image")

    embeds, feats = jax.jit(encode)(params, clip)
    one = MPlug(small)
    frames = jax.jit(lambda p, x: one.apply({"params": p}, x, method="encode_image"))(
        params, clip.reshape(6, 8, 18, 3)
    )
    np.testing.assert_allclose(embeds.reshape(frames.shape), frames, atol=2e-6)
    # The projections of the class tokens are averaged, then made a unit vector.
    head = params["vision_proj"]
    each = np.asarray(frames)[:, 0] @ head["kernel"] + head["bias"]
    mean = each.reshape(2, 3, -1).mean(axis=1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(feats, mean, atol=2e-6)


def test_frames_are_told_apart_by_what_is_added_to_their_tokens(small, params_of):
    config = small.replace(frames=3, frame_positions=True)
    params, clip = params_of(config), RNG.normal(size=(2, 3, 8, 18, 3)).astype(np.float32)
    width = config.text.width

    @jax.jit
    def encode(table):
        changed = {**params, "frame_positions": table}
        return MPlug(config).apply({"params": changed}, clip, method="encode_image")

    without = MPlug(small.replace(frames=3))
    rest = {name: value for name, value in params.items() if name != "frame_positions"}
    plain = jax.jit(lambda p: without.apply({"params": p}, clip, method="encode_image"))(rest)
    first = jax.jit(lambda key: nn.meta.unbox(init_params(config, key))["frame_positions"])
    np.testing.assert_array_equal(first(jax.random.key(0)), 0.0)
    np.testing.assert_allclose(encode(np.zeros((3, width), np.float32)), plain, atol=2e-6)
    table = RNG.normal(size=(3, width)).astype(np.float32)
    told = np.asarray(encode(table)).reshape(2, 3, -1, width)
    expected = np.asarray(plain).reshape(told.shape) + table[:, None]
    np.testing.assert_allclose(told, expected, atol=5e-6)


def test_frames_of_a_picture_cannot_be_told_apart(small):
    with pytest.raises(ValueError, match="frames=1 makes the model take pictures"):
        small.replace(frame_positions=True)


@pytest.mark.parametrize("classified", [1, 2])
def test_the_classifier_reads_the_first_tokens_of_texts_in_a_row(
    small, params_of, reference, classified
):
    config = small.replace(classes=3, classified=classified)
    params = params_of(config)
    fused = RNG.normal(size=(4, 5, config.text.width)).astype(np.float32)
    model = MPlug(config)
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x, method="classify"))(params, fused)
    p = params["classifier"]
    x = fused[:, 0].reshape(4 // classified, -1)
    wanted = reference.dense(p["out"], reference.gelu(reference.dense(p["hidden"], x)))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_only_a_config_with_classes_has_the_head(small, shapes_of):
    assert "classifier" not in shapes_of(small)
    assert "classifier" in shapes_of(small.replace(classes=2))


def test_initialisation_takes_clips(small, shapes_of):
    def shapes(config):
        return jax.tree.map(lambda x: x.shape, shapes_of(config))

    assert shapes(small.replace(frames=4)) == shapes(small)
