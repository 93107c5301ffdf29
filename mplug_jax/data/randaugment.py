"""RandAugment as mPLUG (and ALBEF before it) uses it, on Pillow.

Ten operations, all at one magnitude M of 10 (official `dataset/randaugment.py`):

| operation | at magnitude M |
|---|---|
| Identity, AutoContrast, Equalize | no strength |
| Brightness, Sharpness | factor 0.1 + 1.8 M / 10 (1 leaves the picture as it is) |
| ShearX, ShearY | 0.3 M / 10, either sign |
| TranslateX, TranslateY | 10 M / 10 pixels, either sign |
| Rotate | 30 M / 10 degrees about the centre, either sign |

What a shear, shift or rotation uncovers is grey (128).
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10
GREY = (128, 128, 128)


def auto_contrast(image: Image.Image) -> Image.Image:
    """Stretches each channel's range to 0 .. 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image) -> Image.Image:
    """Makes each channel's histogram as even as a mapping of values can."""
    return ImageOps.equalize(image)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Scales the pixels: 0 is black, 1 the picture itself."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Moves away from (above 1) or towards (below 1) a smoothed version of the picture."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def shear_x(image: Image.Image, factor: float) -> Image.Image:
    """Moves row y right by `factor * y` pixels, row 0 staying where it is."""
    return _affine(image, (1, -factor, 0, 0, 1, 0))


def shear_y(image: Image.Image, factor: float) -> Image.Image:
    """Moves column x down by `factor * x` pixels, column 0 staying where it is."""
    return _affine(image, (1, 0, 0, -factor, 1, 0))


def translate_x(image: Image.Image, pixels: float) -> Image.Image:
    """Moves the picture left by `pixels` (right where negative)."""
    return _affine(image, (1, 0, pixels, 0, 1, 0))


def translate_y(image: Image.Image, pixels: float) -> Image.Image:
    """Moves the picture up by `pixels` (down where negative)."""
    return _affine(image, (1, 0, 0, 0, 1, pixels))


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turns the picture counter-clockwise about its centre."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GREY)


def _affine(image: Image.Image, source: tuple[float, ...]) -> Image.Image:
    """Bilinear warp; `source` maps pixel indices of the result to those of the picture.

    Pillow's matrix maps corners of pixels, the official one (OpenCV) their centres.
    """
    a, b, c, d, e, f = source
    corners = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        corners,
        Image.Resampling.BILINEAR,
        fillcolor=GREY,
    )


# name: (function, strength at full magnitude, strength at magnitude 0, either sign)
_GRADED: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float, bool]] = {
    "Brightness": (brightness, 1.8, 0.1, False),
    "Sharpness": (sharpness, 1.8, 0.1, False),
    "ShearX": (shear_x, 0.3, 0.0, True),
    "ShearY": (shear_y, 0.3, 0.0, True),
    "TranslateX": (translate_x, 10.0, 0.0, True),
    "TranslateY": (translate_y, 10.0, 0.0, True),
    "Rotate": (rotate, 30.0, 0.0, True),
}
OPERATIONS = ("Identity", "AutoContrast", "Equalize", *_GRADED)


def apply_operation(
    image: Image.Image, name: str, magnitude: int, rng: np.random.Generator
) -> Image.Image:
    """One operation of `OPERATIONS` at `magnitude` (0 .. 10); `rng` draws its sign."""
    if name == "Identity":
        return image
    if name == "AutoContrast":
        return auto_contrast(image)
    if name == "Equalize":
        return equalize(image)
    function, full, base, signed = _GRADED[name]
    strength = base + full * magnitude / MAX_MAGNITUDE
    if signed and rng.random() < 0.5:
        strength = -strength
    return function(image, strength)


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    num_ops: int = 2,
    magnitude: int = 7,
    prob: float = 0.5,
) -> Image.Image:
    """Draws `num_ops` operations, with replacement, and applies each with probability `prob`."""
    for index in rng.integers(len(OPERATIONS), size=num_ops):
        if rng.random() < prob:
            image = apply_operation(image, OPERATIONS[index], magnitude, rng)
    return image
