"""Schedules as tables; the fusion network against NumPy, with shared pictures and padding."""

import warnings

import jax
import numpy as np
import pytest

from mplug_jax.models.config import FusionConfig
from mplug_jax.models.fusion import Fusion, layer_kinds, take_rows

KINDS = {"x": "cross", "C": "connected", "o": "co_attention"}


@pytest.mark.parametrize(
    ("schedule", "depth", "stride", "table"),
    [
        # Algorithm 1 counts from 1 and puts a connected layer after every `stride` cross layers.
        ("paper", 6, 1, "xCxCxC"),
        ("paper", 6, 2, "xxCxxC"),
        ("paper", 6, 3, "xxxCxx"),
        ("paper", 3, 2, "xxC"),
        ("paper", 8, 3, "xxxCxxxC"),
        # The released models count from 0 and leave layer 0 a cross layer.
        ("official", 6, 3, "xxxCxx"),
        ("official", 6, 2, "xxCxCx"),
        ("official", 6, 1, "xCCCCC"),
        ("official", 7, 3, "xxxCxxC"),
        ("connected", 4, 3, "CCCC"),
        ("asymmetric", 4, 3, "xxxx"),
        ("co_attention", 3, 3, "ooo"),
    ],
)
def test_schedules(schedule, depth, stride, table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = layer_kinds(schedule, depth, stride)
    assert kinds == tuple(KINDS[letter] for letter in table)


@pytest.mark.parametrize(
    ("schedule", "depth", "stride"), [("official", 6, 6), ("paper", 6, 6), ("official", 1, 1)]
)
def test_a_schedule_left_without_a_connected_layer_warns(schedule, depth, stride):
    with pytest.warns(UserWarning, match=f"{schedule!r}.*depth={depth}.*stride={stride}.*never"):
        assert layer_kinds(schedule, depth, stride) == ("cross",) * depth


def test_an_unknown_schedule_lists_the_choices():
    with pytest.raises(ValueError, match=r"'zigzag'.*paper.*official.*connected.*co_attention"):
        layer_kinds("zigzag", 6, 3)


def streams(config):
    """Two pictures, three texts about them, and which text asks about which picture."""
    rng = np.random.default_rng(5)
    image = rng.normal(size=(2, 5, config.text.width)).astype(np.float32)
    text = rng.normal(size=(3, 4, config.text.width)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    return image, text, mask, np.array([1, 0, 1])


@pytest.mark.parametrize(
    ("schedule", "norm", "kinds"),
    [
        ("official", "post", ("cross", "connected")),
        ("paper", "pre", ("cross", "connected")),
        ("connected", "post", ("connected", "connected")),
        ("co_attention", "post", ("co_attention", "co_attention")),
        ("asymmetric", "pre", ("cross", "cross")),
    ],
)
def test_fusion_is_the_numpy_one(small, params_of, reference, schedule, norm, kinds):
    config = small.replace(text={"norm": norm}, fusion={"schedule": schedule, "stride": 1})
    params = params_of(config)["fusion"]
    image, text, mask, index = streams(config)
    run = jax.jit(Fusion(config.fusion, config.text).apply)

    got = run({"params": params}, image, text, mask, index)
    want = reference.fusion(
        params, image[index], text, mask, kinds, schedule == "official", config.text
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    if schedule == "asymmetric":
        np.testing.assert_array_equal(got[0], image[index])

    # A padded text token reaches neither stream.
    other = np.where(mask[..., None], text, 9.0)
    padded = run({"params": params}, image, other, mask, index)
    np.testing.assert_array_equal(padded[0], got[0])
    np.testing.assert_array_equal(padded[1][mask], got[1][mask])


def test_rows_are_taken_within_parts():
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    index = np.array([[2, 0, 0, 1], [1, 1, 2, 0]])
    want = np.concatenate([x[:3][index[0]], x[3:][index[1]]])
    np.testing.assert_array_equal(take_rows(x, index), want)
    np.testing.assert_array_equal(take_rows(x, index[:1]), x[index[0]])
    np.testing.assert_array_equal(take_rows(x, index[0]), x[index[0]])
    assert take_rows(x, None) is x


def test_an_index_equals_gathered_pictures(small, params_of):
    variables = {"params": params_of(small)["fusion"]}
    image, text, mask, index = streams(small)
    run = jax.jit(Fusion(small.fusion, small.text).apply)
    shared = run(variables, image, text, mask, index)
    gathered = run(variables, image[index], text, mask)
    for a, b in zip(shared, gathered, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    ("schedule", "depth"),
    [("paper", 2), ("official", 2), ("paper", 3), ("asymmetric", 2), ("co_attention", 2)],
)
def test_what_fusion_makes_of_some_pictures_is_what_it_makes_of_them_among_all(
    small, params_of, schedule, depth, norm
):
    config = small.replace(
        text={"norm": norm}, fusion={"schedule": schedule, "stride": 1, "depth": depth}
    )
    params = params_of(config)["fusion"]
    image, text, mask, index = streams(config)
    run = jax.jit(Fusion(config.fusion, config.text).apply, static_argnums=5)
    all_images, all_text = run({"params": params}, image, text, mask, index, None)
    for count in range(len(text) + 1):
        images, texts = run({"params": params}, image, text, mask, index, count)
        assert len(images) == count
        np.testing.assert_allclose(images, all_images[len(text) - count :], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(texts, all_text, rtol=1e-5, atol=1e-5)


def test_pictures_wanted_of_parts_are_the_last_of_each(small, params_of):
    config = small.replace(fusion={"schedule": "connected", "depth": 2})
    image, text, mask, _ = streams(config)
    pictures = np.concatenate([image[:2], image[:2] + 1])
    index = np.array([[1, 0, 1], [0, 0, 1]])
    text, mask = np.tile(text, (2, 1, 1)), np.tile(mask, (2, 1))
    run = jax.jit(Fusion(config.fusion, config.text).apply, static_argnums=5)
    arguments = {"params": params_of(config)["fusion"]}, pictures, text, mask, index
    all_images, _ = run(*arguments, None)
    images, _ = run(*arguments, 4)
    np.testing.assert_allclose(images, all_images[np.array([1, 2, 4, 5])], rtol=1e-5, atol=1e-5)


def test_pictures_that_are_not_wanted_cost_nothing_in_the_last_layer(small, params_of):
    config = small.replace(fusion={"schedule": "connected", "depth": 1})
    image, text, mask, index = streams(config)

    def flops(wanted):
        run = jax.jit(Fusion(config.fusion, config.text).apply, static_argnums=5)
        arguments = ({"params": params_of(config)["fusion"]}, image, text, mask, index, wanted)
        return run.lower(*arguments).compile().cost_analysis()["flops"]

    # Of 9 tokens a row 4 are text: of 12 D^2 multiplications a token, keys and values (2) are
    # made of all, queries, output and feed-forward (10) of the text.
    ratio = flops(0) / flops(None)
    assert ratio == pytest.approx((2 * 9 + 10 * 4) / (12 * 9), abs=0.06)


def test_cross_layers_make_keys_and_values_once_a_picture(small, params_of):
    config = small.replace(fusion=vars(FusionConfig(depth=1, schedule="asymmetric")))
    module = Fusion(config.fusion, config.text)
    image, text, mask, _ = streams(config)
    texts, width = 40, config.text.width
    traced = jax.make_jaxpr(module.apply)(
        {"params": params_of(config)["fusion"]},
        image,
        text[:1].repeat(texts, axis=0),
        mask[:1].repeat(texts, axis=0),
        np.zeros(texts, np.int32),
    )
    projected = [
        equation.invars[0].aval.shape
        for equation in traced.jaxpr.eqns
        if equation.primitive.name == "dot_general"
        and equation.invars[0].aval.shape[1:] == (image.shape[1], width)
    ]
    assert projected == [image.shape] * 2  # keys and values, of 2 pictures and not of 40
