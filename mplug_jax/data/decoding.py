"""Image files to pixels: exactly as Pillow does it, or faster and a little less exactly."""

import contextlib
import functools
import importlib
import io
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from mplug_jax.data.files import RemotePath, is_remote
from mplug_jax.data.records import BadSample, SourceError

# Pillow's own limit against decompression bombs, about 89 megapixels (0.27 GB of RGB).
MAX_PIXELS = 89_478_485

Picture = str | os.PathLike[str] | bytes | np.ndarray
Box = tuple[int, int, int, int]  # left, top, width, height

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# What JPEG can be decoded to, as a fraction of its size, besides 1: 1/2, 1/4, 1/8.
_SHRINKS = (8, 4, 2)
# Bytes; the fast decoder needs a whole file in memory, Pillow does not.
_MAX_JPEG = 2**26


def decode_image(image: Picture) -> np.ndarray:
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
    return np.asarray(read_picture(image))


def read_picture(image: Picture) -> Image.Image:
    """As `decode_image`, to a Pillow picture of mode RGB."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(_checked_pixels(image))
    with _opened(image) as opened:
        return _to_rgb(_upright(opened))


def decode_part(
    image: Picture, draw_box: Callable[[int, int], Box], size: tuple[int, int]
) -> tuple[np.ndarray, Box]:
    """Decodes a picture fast, no larger than a part of it needs that will be resized.

    Upright JPEGs in colour or grey are decoded by libjpeg-turbo's fast methods (simplejpeg), at
    1/2, 1/4 or 1/8 of their size where the part still has `size` pixels then. All others, and
    those that it has a complaint about, are decoded by Pillow: what can be used, and what is
    refused for which reason, is the same as with `decode_image`.

    Args:
      image: as in `decode_image`.
      draw_box: of width and height of the picture, the part that is wanted; called once.
      size: (height, width) that the part will be resized to.

    Returns:
      uint8 [h, w, 3] and where the part lies in it, to the nearest pixel.

    Raises:
      As `decode_image`.
    """
    if isinstance(image, np.ndarray):
        pixels = _checked_pixels(image)
        return pixels, draw_box(pixels.shape[1], pixels.shape[0])
    box = None
    with _opened(image) as opened:
        if _is_plain_jpeg(opened):
            box = draw_box(*opened.size)
            shrink = next((n for n in _SHRINKS if _large_enough(box, size, n)), 1)
            pixels = _decode_jpeg(opened, shrink)
            if pixels is not None:
                return pixels, _shrunk(box, shrink, pixels)
        picture = _to_rgb(_upright(opened))
    return np.asarray(picture), box or draw_box(*picture.size)


@functools.cache
def fast_packages() -> tuple[ModuleType, ModuleType]:
    """simplejpeg and OpenCV, which the fast decoder works with.

    Raises:
      ValueError: they are not installed.
    """
    try:
        simplejpeg, cv2 = map(importlib.import_module, ("simplejpeg", "cv2"))
    except ImportError as error:
        raise ValueError(
            f"config.data.decoder='fast' needs a package that is not installed ({error}): "
            "pip install 'mplug_jax[fast]', or set config.data.decoder='pillow'"
        ) from error
    # The pipeline's own threads and processes share the cores out.
    cv2.setNumThreads(1)
    return simplejpeg, cv2


def _is_plain_jpeg(opened: Image.Image) -> bool:
    """Whether the fast decoder may try: one upright JPEG whose pixels need no treatment."""
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return False
    try:
        return opened.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # a damaged tag, see `_upright`
        return False


def _large_enough(box: Box, size: tuple[int, int], shrink: int) -> bool:
    _, _, width, height = box
    return width >= shrink * size[1] and height >= shrink * size[0]


def _decode_jpeg(opened: Image.Image, shrink: int) -> np.ndarray | None:
    """A JPEG at 1 / `shrink` of its size, rounded up; None leaves it to Pillow."""
    if opened.fp.seek(0, os.SEEK_END) > _MAX_JPEG:
        return None
    opened.fp.seek(0)
    content = opened.fp.read()
    width, height = opened.size
    scaled = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
    simplejpeg = fast_packages()[0]
    try:
        # Only what both read the same size in has been bounded, and is cut where it was drawn.
        if simplejpeg.decode_jpeg_header(content)[:2] != (height, width):
            return None
        return simplejpeg.decode_jpeg(
            content,
            fastdct=True,
            fastupsample=True,
            **(scaled | {"min_factor": shrink} if shrink > 1 else {}),
        )
    except ValueError:  # strict: also what libjpeg only warns about, such as a cut off file
        return None


def _shrunk(box: Box, shrink: int, pixels: np.ndarray) -> Box:
    left, top, width, height = box
    x1, y1 = round(left / shrink), round(top / shrink)
    x2 = min(round((left + width) / shrink), pixels.shape[1])
    y2 = min(round((top + height) / shrink), pixels.shape[0])
    return x1, y1, x2 - x1, y2 - y1


@contextlib.contextmanager
def _opened(image: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """The picture with its header read and checked; whatever fails in it becomes BadSample."""
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
            yield opened
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
