"""Image decoding and the picture transforms of the official recipes (facts: section "Images").

Everything works on uint8 RGB; mean and standard deviation are applied on the device. Resampling is
Pillow's antialiased bicubic, as in the published results.
"""

import io
import math
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from mplug_jax.data.files import RemotePath, is_remote
from mplug_jax.data.randaugment import rand_augment
from mplug_jax.data.records import BadSample, SourceError

# Pillow's own limit against decompression bombs, about 89 megapixels (0.27 GB of RGB).
MAX_PIXELS = 89_478_485


def decode_image(image: str | os.PathLike[str] | bytes | np.ndarray) -> np.ndarray:
    """Reads a picture of any common kind into uint8 RGB [H, W, 3].

    Args:
      image: path or URL of a file, encoded bytes, or uint8 pixels [H, W, 3] (returned as they are)
        or [H, W].

    Orientation tags (EXIF) are applied; palette, grey, CMYK and 16-bit pictures are converted;
    transparency is dropped, as PIL's `convert("RGB")` does.

    Raises:
      BadSample: missing, empty, truncated, no image at all, or larger than `MAX_PIXELS`; the
        message has path and reason.
      SourceError: a URL, and the package that reads such ones is missing.
    """
    if isinstance(image, np.ndarray):
        return _checked_pixels(image)
    if isinstance(image, bytes):
        name, file = f"<{len(image)} bytes>", io.BytesIO(image)
    else:
        name, file = os.fspath(image), image
    try:
        if is_remote(name):
            file = io.BytesIO(RemotePath(name).read_bytes())
        with Image.open(file) as opened:
            if opened.format == "EPS":
                # Decoding PostScript means running it, in Ghostscript.
                raise BadSample(f"{name}: is a PostScript program, which is not run")
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadSample(
                    f"{name}: {width}x{height} pixels are more than the {MAX_PIXELS} allowed"
                )
            return np.asarray(_to_rgb(_upright(opened)))
    except (BadSample, SourceError):
        raise
    except FileNotFoundError as error:
        raise BadSample(f"{name}: no such file") from error
    except Exception as error:
        # Pillow's decoders raise whatever their parsing stumbles over (OSError, SyntaxError,
        # ValueError, IndexError, struct.error, zlib.error, DecompressionBombError, ...).
        if not isinstance(image, bytes) and os.path.isfile(image) and not os.path.getsize(image):
            raise BadSample(f"{name}: the file is empty") from error
        raise BadSample(f"{name}: cannot be decoded: {error}") from error


def _checked_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise BadSample(f"<array>: {pixels.dtype} {list(pixels.shape)} is no uint8 picture")
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise BadSample(f"<array>: shape {list(pixels.shape)} is not [H, W, 3]")
    return pixels


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # decoding errors must surface here, not be taken for a damaged tag
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag says nothing about the pixels: keep them as stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # 16 bits a sample
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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
) -> tuple[int, int, int, int]:
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
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random part of the picture (see `crop_box`) resized to (height, width)."""
    left, top, width, height = crop_box(*image.size, rng, scale, ratio)
    # Cropped first: `resize(box=)` would let pixels from outside the box into its border.
    return _resize(image.crop((left, top, left + width, top + height)), size)


def horizontal_flip(image: Image.Image) -> Image.Image:
    """Left becomes right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture between decoding and the batch: `(pixels, rng) -> pixels`.

    Attributes:
      size: (height, width) of the result.
      train: False resizes and does nothing else; the other fields then have no effect.
      crop_scale: range of the random crop's area as a fraction of the picture's (0.5 to 1 in
        fine-tuning, 0.2 to 1 in pre-training); None resizes the whole picture.
      flip: mirror every other picture (with captions that say left or right, better not).
      randaugment: RandAugment with two operations at magnitude 7 (see
        `mplug_jax.data.randaugment`).
    """

    size: tuple[int, int]
    train: bool = False
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    flip: bool = True
    randaugment: bool = True

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width) in pixels, not {self.size!r}")
        scale = self.crop_scale
        if scale is not None and not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, not {scale!r}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 [h, w, 3] to uint8 [*size, 3]; `rng` is used in training alone."""
        if not self.train:
            return self._resized(image)
        if self.crop_scale is None and not self.flip and not self.randaugment:
            return self._resized(image)
        picture = Image.fromarray(image)
        if self.crop_scale is None:
            picture = square_resize(picture, self.size)
        else:
            picture = random_resized_crop(picture, rng, self.size, self.crop_scale)
        if self.flip and rng.random() < 0.5:
            picture = horizontal_flip(picture)
        if self.randaugment:
            picture = rand_augment(picture, rng)
        return np.asarray(picture)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] == tuple(self.size):
            return image
        return np.asarray(square_resize(Image.fromarray(image), self.size))
