"""The picture transforms of the official recipes.

Everything works on uint8 RGB; mean and standard deviation are applied on the device. Resampling is
Pillow's antialiased bicubic, as in the published results, unless the fast decoder is asked for.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mplug_jax.data.decoding import (
    Box,
    Picture,
    decode_image,
    decode_part,
    fast_packages,
    read_picture,
)
from mplug_jax.data.randaugment import rand_augment

DECODERS = ("pillow", "fast")
# Width to height of random crops, as in torchvision.
RATIO = (3 / 4, 4 / 3)
# OpenCV's bilinear resampling does not antialias: what shrinks by more than this is averaged.
AVERAGED_FROM = 1.5


def square_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic resize to (height, width), whatever the aspect ratio was."""
    height, width = size
    return image if image.size == (width, height) else _resize(image, size)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Left, top, width, height of a random crop, by the law of torchvision's RandomResizedCrop.

    The area is uniform in `scale` times the picture's, the aspect ratio log-uniform in `ratio`;
    after ten crops that do not fit, the largest central one whose ratio is allowed.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(log_low, log_high))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = RATIO,
) -> Image.Image:
    """A random part of the picture (see `crop_box`) resized to (height, width)."""
    left, top, width, height = crop_box(*image.size, rng, scale, ratio)
    # Cropped first: `resize(box=)` would let pixels from outside the box into its border.
    return _resize(image.crop((left, top, left + width, top + height)), size)


def horizontal_flip(image: Image.Image) -> Image.Image:
    """Left becomes right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def fast_resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] to [*size, 3] by OpenCV: bilinear or, where much smaller, averaged."""
    cv2 = fast_packages()[1]
    (height, width), (new_height, new_width) = pixels.shape[:2], size
    if max(height / new_height, width / new_width) > AVERAGED_FROM:
        # By itself, as INTER_AREA does not average where the other axis grows.
        smaller = (min(width, new_width), min(height, new_height))
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    if pixels.shape[:2] == tuple(size):
        return pixels
    return cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture on its way into the batch: `(picture, rng) -> pixels`.

    Attributes:
      size: (height, width) of the result.
      train: False resizes and does nothing else; the other fields then have no effect.
      crop_scale: range of the random crop's area as a fraction of the picture's (0.5 to 1 in
        fine-tuning, 0.2 to 1 in pre-training); None resizes the whole picture.
      flip: mirror every other picture (with captions that say left or right, better not).
      randaugment: RandAugment with two operations at magnitude 7 (see
        `mplug_jax.data.randaugment`).
      decoder: "pillow" decodes and resamples as Pillow does; "fast" by libjpeg-turbo and OpenCV,
        with pixels a few grey levels off. Crops, flips and all that is drawn are the same.

    Raises:
      ValueError: a size, a scale or a decoder that cannot be, or whose packages are missing.
    """

    size: tuple[int, int]
    train: bool = False
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    flip: bool = True
    randaugment: bool = True
    decoder: str = "pillow"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width) in pixels, not {self.size!r}")
        scale = self.crop_scale
        if scale is not None and not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, not {scale!r}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, not {self.decoder!r}")
        if self.decoder == "fast":
            fast_packages()

    def __call__(self, image: Picture, rng: np.random.Generator | None) -> np.ndarray:
        """What `decode_image` takes to uint8 [*size, 3]; `rng` is used in training alone.

        Raises as `decode_image`.
        """
        if not self.train:
            return self._resized(image)
        if self.decoder == "fast":
            return self._fast(image, rng)
        if self.crop_scale is None and not self.flip and not self.randaugment:
            return self._resized(image)
        picture = read_picture(image)
        if self.crop_scale is None:
            picture = square_resize(picture, self.size)
        else:
            picture = random_resized_crop(picture, rng, self.size, self.crop_scale)
        if self.flip and rng.random() < 0.5:
            picture = horizontal_flip(picture)
        if self.randaugment:
            picture = rand_augment(picture, rng)
        return np.asarray(picture)

    def _resized(self, image: Picture) -> np.ndarray:
        pixels = decode_image(image)
        if pixels.shape[:2] == tuple(self.size):
            return pixels
        return np.asarray(square_resize(Image.fromarray(pixels), self.size))

    def _fast(self, image: Picture, rng: np.random.Generator) -> np.ndarray:
        pixels, box = decode_part(image, functools.partial(self._box, rng), self.size)
        left, top, width, height = box
        picture = fast_resize(pixels[top : top + height, left : left + width], self.size)
        if self.flip and rng.random() < 0.5:
            picture = fast_packages()[1].flip(picture, 1)
        if self.randaugment:
            return np.asarray(rand_augment(Image.fromarray(picture), rng))
        return np.ascontiguousarray(picture)

    def _box(self, rng: np.random.Generator, width: int, height: int) -> Box:
        if self.crop_scale is None:
            return 0, 0, width, height
        return crop_box(width, height, rng, self.crop_scale, RATIO)
