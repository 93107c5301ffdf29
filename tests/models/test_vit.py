"""The image encoder against NumPy, on pictures of the configured size and of others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models.config import DINOV2, VisionConfig
from mplug_jax.models.vit import ConvStem, ViT, normalise, resize_positions


def bilinear(grid, rows, columns):
    """Half-pixel centres, clamped at the edges, no antialiasing; one output cell at a time."""
    old_rows, old_columns = grid.shape[:2]

    def neighbours(i, new, old):
        centre = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = int(centre)
        return low, min(low + 1, old - 1), centre - low

    out = np.zeros((rows, columns, grid.shape[2]))
    for r in range(rows):
        top, bottom, down = neighbours(r, rows, old_rows)
        for c in range(columns):
            left, right, across = neighbours(c, columns, old_columns)
            upper = (1 - across) * grid[top, left] + across * grid[top, right]
            lower = (1 - across) * grid[bottom, left] + across * grid[bottom, right]
            out[r, c] = (1 - down) * upper + down * lower
    return out


def resized(table, old, new):
    grid = bilinear(table[1:].reshape(*old, -1), *new)
    return np.concatenate([table[:1], grid.reshape(new[0] * new[1], -1)])


@pytest.mark.parametrize(
    ("old", "new"), [((3, 3), (5, 5)), ((7, 7), (5, 5)), ((2, 5), (3, 4)), ((4, 2), (1, 9))]
)
def test_positions_are_resampled_bilinearly(old, new):
    table = np.random.default_rng(0).normal(size=(1 + old[0] * old[1], 3)).astype(np.float32)
    got = resize_positions(jnp.asarray(table), old, new)
    np.testing.assert_allclose(got, resized(table, old, new), atol=1e-5)


def test_positions_of_the_same_grid_stay_as_they_are():
    table = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, (2, 3), (2, 3)), table)


def test_bytes_are_normalised_and_floats_are_taken_as_they_come():
    vision = VisionConfig()
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    want = (image / 255 - np.array(vision.image_mean)) / np.array(vision.image_std)
    np.testing.assert_allclose(normalise(jnp.asarray(image), vision), want, atol=1e-5)
    floats = jnp.asarray(want, jnp.float32)
    np.testing.assert_array_equal(normalise(floats, vision), floats)


@pytest.mark.parametrize(("kind", "grid"), [({}, (2, 3)), ({}, (3, 2)), (DINOV2, (2, 3))])
def test_vit_is_the_numpy_one(small, params_of, reference, kind, grid):
    config = small.replace(vision=kind)
    vision = config.vision
    assert vision.grid == (2, 3)  # so that the second grid is another one
    params = params_of(config)["visual_encoder"]
    sides = [side * patch for side, patch in zip(grid, vision.patch_size, strict=True)]
    image = np.random.default_rng(1).normal(size=(2, *sides, 3)).astype(np.float32)
    got = jax.jit(ViT(vision).apply)({"params": params}, image)
    positions = resized(params["position_embedding"], vision.grid, grid)
    assert got.shape == (2, 7, vision.width)
    np.testing.assert_allclose(got, reference.vit(params, image, vision, positions), atol=1e-4)


def test_what_dinov2_has_where_clip_has_not(small, shapes_of):
    vision = small.replace(vision=DINOV2 | {"layer_scale": 0.25}).vision
    image = jnp.zeros((1, *vision.image_size, 3))
    params = nn.meta.unbox(ViT(vision).init(jax.random.key(0), image))["params"]
    assert "ln_pre" not in params
    np.testing.assert_array_equal(params["patch_embedding"]["bias"], np.zeros(vision.width))
    for name in ("layer_scale_1", "layer_scale_2"):
        scale = params["blocks"][name]["scale"]
        np.testing.assert_array_equal(scale, np.full((vision.depth, vision.width), 0.25))
    clip = shapes_of(small)["visual_encoder"]
    assert not any("layer_scale" in name for name in clip["blocks"])
    assert "bias" not in clip["patch_embedding"]


def test_a_picture_without_whole_patches_is_refused(small):
    with pytest.raises(ValueError, match=r"\(8, 20\) px has no whole \(4, 6\) patches"):
        ViT(small.vision).init(jax.random.key(0), np.zeros((1, 8, 20, 3), np.float32))


def test_the_convolutional_stem_keeps_the_patch_grid():
    vision = VisionConfig(
        image_size=(16, 32), patch_size=(8, 8), width=32, depth=1, heads=2, mlp_dim=8, stem="conv"
    )
    tokens, variables = jax.eval_shape(
        ViT(vision).init_with_output, jax.random.key(0), jnp.zeros((3, 16, 32, 3))
    )
    assert tokens.shape == (3, 1 + 2 * 4, 32)
    assert "patch_embedding" not in variables["params"]

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.3 * rng.normal(size=x.shape), nn.meta.unbox(variables["params"]["stem"])
    )
    image = rng.normal(size=(1, 16, 32, 3)).astype(np.float32)
    changed = image.copy()
    changed[:, 3:5, 11:13] += 1  # inside the patch of row 0, column 1
    run = jax.jit(ConvStem(vision, jnp.float32).apply)
    moved = np.abs(run({"params": params}, changed) - run({"params": params}, image)).max((0, 3))
    # Each layer looks one pixel to the right and down, three of them 14: into the next patch.
    assert moved.shape == (2, 4) and moved[0, 1] > 0.01
    np.testing.assert_array_equal(moved[1], 0)
    np.testing.assert_array_equal(moved[0, 2:], 0)


@pytest.mark.parametrize(("stem", "deviation"), [("conv", 1.0), ("patch", 32**-0.5)])
def test_positions_begin_as_large_as_the_tokens_they_are_added_to(stem, deviation):
    vision = VisionConfig(
        image_size=(32, 32), patch_size=(4, 4), width=32, depth=1, heads=2, mlp_dim=8, stem=stem
    )
    key, image = jax.random.key(0, impl="rbg"), jnp.zeros((1, 32, 32, 3))
    variables = ViT(vision).init(key, image)
    positions = nn.meta.unbox(variables["params"])["position_embedding"]
    assert positions.shape == (65, 32)
    assert float(positions.std()) == pytest.approx(deviation, rel=0.1)
