"""Every RandAugment operation against NumPy."""

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.randaugment import (
    OPERATIONS,
    apply_operation,
    auto_contrast,
    brightness,
    equalize,
    rand_augment,
    rotate,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


@pytest.fixture
def pixels():
    """A smooth picture, so that half a pixel of error shows as more than rounding."""
    y, x = np.mgrid[0:40, 0:48]
    waves = [np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)]
    return (60 + 80 * (1 + np.stack(waves, -1))).astype(np.uint8)


def run(operation, pixels, *arguments):
    return np.asarray(operation(Image.fromarray(pixels), *arguments)).astype(int)


def bilinear(pixels, source_x, source_y):
    """Samples at the given pixel indices; NaN where a neighbour is missing."""
    height, width = pixels.shape[:2]
    x0, y0 = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    fx, fy = (source_x - x0)[..., None], (source_y - y0)[..., None]
    inside = (x0 >= 0) & (y0 >= 0) & (x0 < width - 1) & (y0 < height - 1)
    x0, y0 = x0.clip(0, width - 2), y0.clip(0, height - 2)
    value = sum(
        pixels[y0 + j, x0 + i] * (fx if i else 1 - fx) * (fy if j else 1 - fy)
        for i in (0, 1)
        for j in (0, 1)
    )
    return np.where(inside[..., None], value, np.nan)


def assert_warped(result, expected, filled):
    known = ~np.isnan(expected)
    assert known.mean() > 0.6
    np.testing.assert_allclose(result[known], expected[known], atol=1.01)
    assert filled.any() and (result[filled] == 128).all()


def test_auto_contrast(pixels):
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    expected = (pixels - low) * 255 / (high - low)
    np.testing.assert_allclose(run(auto_contrast, pixels), expected, atol=1)
    flat = np.full((4, 4, 3), 7, np.uint8)
    np.testing.assert_array_equal(run(auto_contrast, flat), flat)


def test_equalize(pixels):
    """Value v maps to (pixels below v + half a step) / step, with a step of about n / 255."""
    expected = np.empty(pixels.shape, int)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        expected[..., channel] = ((below + step // 2) // step).clip(0, 255)[pixels[..., channel]]
    np.testing.assert_array_equal(run(equalize, pixels), expected)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.36, 1.9])
def test_brightness(pixels, factor):
    expected = (pixels * np.float32(factor)).clip(0, 255)
    np.testing.assert_allclose(run(brightness, pixels, factor), expected, atol=1)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.36, 1.9])
def test_sharpness(pixels, factor):
    """Blend with the 3x3 mean that weighs the centre five times; the border stays."""
    wide = pixels.astype(float)
    total = sum(wide[1 + j : 39 + j, 1 + i : 47 + i] for i in (-1, 0, 1) for j in (-1, 0, 1))
    smooth = wide.copy()
    smooth[1:-1, 1:-1] = np.floor((total + 4 * wide[1:-1, 1:-1]) / 13 + 0.5)
    expected = (smooth + factor * (wide - smooth)).clip(0, 255)
    np.testing.assert_allclose(run(sharpness, pixels, factor), expected, atol=1)


@pytest.mark.parametrize("factor", [0.21, -0.21])
def test_shears(pixels, factor):
    y, x = np.mgrid[0:40, 0:48].astype(float)
    source = x - factor * y
    filled = (source < -1) | (source > 48)
    assert_warped(run(shear_x, pixels, factor), bilinear(pixels, source, y), filled)
    source = y - factor * x
    filled = (source < -1) | (source > 40)
    assert_warped(run(shear_y, pixels, factor), bilinear(pixels, x, source), filled)


@pytest.mark.parametrize("shift", [7, -7])
def test_whole_translations_are_exact(pixels, shift):
    expected = np.full_like(pixels, 128)
    if shift > 0:
        expected[:, :-shift] = pixels[:, shift:]
    else:
        expected[:, -shift:] = pixels[:, :shift]
    np.testing.assert_array_equal(run(translate_x, pixels, shift), expected)
    transposed = pixels.transpose(1, 0, 2).copy()
    result = run(translate_y, transposed, shift)
    np.testing.assert_array_equal(result, expected.transpose(1, 0, 2))


@pytest.mark.parametrize("degrees", [21, -21])
def test_rotate(pixels, degrees):
    angle = np.deg2rad(degrees)
    y, x = np.mgrid[0:40, 0:48].astype(float)
    dx, dy = x - 23.5, y - 19.5
    # Seen with y pointing down, counter-clockwise by the angle.
    source_x = 23.5 + np.cos(angle) * dx - np.sin(angle) * dy
    source_y = 19.5 + np.sin(angle) * dx + np.cos(angle) * dy
    filled = (source_x < -1) | (source_x > 48) | (source_y < -1) | (source_y > 40)
    assert_warped(run(rotate, pixels, degrees), bilinear(pixels, source_x, source_y), filled)


def test_strengths_of_the_official_recipe(pixels):
    """At magnitude 7: factor 1.36, shear 0.21, shift 7 pixels, 21 degrees, both signs."""
    image = Image.fromarray(pixels)
    expected = {
        "Identity": [pixels],
        "AutoContrast": [run(auto_contrast, pixels)],
        "Equalize": [run(equalize, pixels)],
        "Brightness": [run(brightness, pixels, 1.36)],
        "Sharpness": [run(sharpness, pixels, 1.36)],
        "ShearX": [run(shear_x, pixels, s * 0.21) for s in (1, -1)],
        "ShearY": [run(shear_y, pixels, s * 0.21) for s in (1, -1)],
        "TranslateX": [run(translate_x, pixels, s * 7) for s in (1, -1)],
        "TranslateY": [run(translate_y, pixels, s * 7) for s in (1, -1)],
        "Rotate": [run(rotate, pixels, s * 21) for s in (1, -1)],
    }
    assert set(OPERATIONS) == set(expected)
    for name, choices in expected.items():
        seen = set()
        for seed in range(12):
            result = np.asarray(apply_operation(image, name, 7, np.random.default_rng(seed)))
            matches = [
                i
                for i, choice in enumerate(choices)
                if np.abs(choice - result.astype(int)).max() <= 1
            ]
            assert matches, name
            seen.add(matches[0])
        assert len(seen) == len(choices), name


def test_rand_augment_applies_half_of_two_draws(pixels):
    image = Image.fromarray(pixels)
    changed = [
        not np.array_equal(np.asarray(rand_augment(image, np.random.default_rng(seed))), pixels)
        for seed in range(400)
    ]
    # Two draws, each applied with p = 1/2 and other than Identity with p = 9/10.
    assert np.mean(changed) == pytest.approx(1 - 0.55**2, abs=0.08)
    untouched = rand_augment(image, np.random.default_rng(0), prob=0.0)
    np.testing.assert_array_equal(np.asarray(untouched), pixels)
    first, second = (rand_augment(image, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
