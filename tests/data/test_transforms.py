"""Decoding of awkward files, and the geometry of the transforms against NumPy."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import (
    ImageTransform,
    crop_box,
    decode_image,
    horizontal_flip,
    random_resized_crop,
    square_resize,
)

# Pillow rounds to 8 bits after each of its two passes.
ROUNDING = 1.5


@pytest.fixture
def pixels():
    """Noise without extremes, which bicubic overshoot would clip."""
    return np.random.default_rng(0).integers(70, 190, (30, 50, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bicubic_reference(pixels, height, width):
    """Antialiased Catmull-Rom (a = -0.5) resampling, separable, in float64."""

    def weights(size, new):
        scale = size / new
        stretch = max(scale, 1.0)
        centres = (np.arange(new) + 0.5) * scale
        distance = np.abs((np.arange(size) + 0.5 - centres[:, None]) / stretch)
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
        return kernel / kernel.sum(1, keepdims=True)

    across = np.einsum("xw,hwc->hxc", weights(pixels.shape[1], width), pixels.astype(float))
    return np.einsum("yh,hxc->yxc", weights(pixels.shape[0], height), across)


def test_png_path_and_bytes_and_array_agree(pixels, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for image in (path, str(path), path.read_bytes(), pixels):
        np.testing.assert_array_equal(decode_image(image), pixels)
    assert decode_image(pixels) is pixels


def test_grey_palette_alpha_cmyk_and_16_bit(pixels):
    grey = pixels[..., 0]
    stacked = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey), "PNG")), stacked)
    np.testing.assert_array_equal(decode_image(grey), stacked)

    palette = Image.fromarray(grey % 4, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = np.arange(10, 130, 10, dtype=np.uint8).reshape(4, 3)
    for options in ({}, {"transparency": b"\x00\xff\x80\xff"}):
        np.testing.assert_array_equal(
            decode_image(encoded(palette, "PNG", **options)), colours[grey % 4]
        )

    alpha = Image.fromarray(np.dstack([pixels, grey]), "RGBA")
    np.testing.assert_array_equal(decode_image(encoded(alpha, "PNG")), pixels)

    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    decoded = decode_image(encoded(cyan, "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)
    np.testing.assert_allclose(decoded[8, 8], [0, 255, 255], atol=6)

    deep = grey.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(deep), "PNG")), stacked)


def test_exif_orientation_is_applied(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.rot90(pixels, 3))


@pytest.mark.parametrize("kind", ["missing", "empty", "html", "truncated", "folder"])
def test_unreadable_files_name_path_and_reason(kind, pixels, tmp_path):
    path = tmp_path / "bad.jpg"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<html><body>404 Not Found</body></html>")
    elif kind == "truncated":
        noisy = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        path.write_bytes(encoded(Image.fromarray(noisy), "JPEG")[:2000])
    elif kind == "folder":
        path.mkdir()
    reasons = {"missing": "no such file", "empty": "empty", "truncated": "truncated"}
    with pytest.raises(BadSample, match=rf"bad\.jpg.*{reasons.get(kind, 'cannot be decoded')}"):
        decode_image(str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_enormous_pictures_are_refused_before_decoding(side):
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(BadSample, match="pixels"):
        decode_image(data)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(BadSample, match="<array>"):
        decode_image(array)


@pytest.mark.parametrize("size", [(20, 20), (64, 40), (7, 90)])
def test_square_resize_is_antialiased_bicubic(pixels, size):
    result = np.asarray(square_resize(Image.fromarray(pixels), size))
    np.testing.assert_allclose(result, bicubic_reference(pixels, *size), atol=ROUNDING)


def test_crop_of_everything_is_a_resize(pixels):
    square = Image.fromarray(pixels[:30, :30])
    rng = np.random.default_rng(0)
    crop = random_resized_crop(square, rng, (16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = bicubic_reference(pixels[:30, :30], 16, 16)
    np.testing.assert_allclose(np.asarray(crop), expected, atol=ROUNDING)


def test_crop_takes_the_box_it_says(pixels):
    """The crop shows nothing from outside its box, not even through the resampling kernel."""
    left, top, width, height = crop_box(
        50, 30, np.random.default_rng(3), scale=(0.2, 0.4), ratio=(3 / 4, 4 / 3)
    )
    crop = random_resized_crop(
        Image.fromarray(pixels), np.random.default_rng(3), (12, 12), scale=(0.2, 0.4)
    )
    expected = bicubic_reference(pixels[top : top + height, left : left + width], 12, 12)
    np.testing.assert_allclose(np.asarray(crop), expected, atol=ROUNDING)


def test_crop_law():
    """Area uniform, aspect ratio log-uniform, place uniform: quantiles of 4,000 crops."""
    rng = np.random.default_rng(0)
    boxes = np.array(
        [crop_box(1000, 1000, rng, scale=(0.2, 0.6), ratio=(3 / 4, 4 / 3)) for _ in range(4000)]
    )
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 1000).all()
    assert (top >= 0).all() and (top + height <= 1000).all()
    quantiles = np.linspace(0, 1, 11)
    area = width * height / 1e6
    np.testing.assert_allclose(np.quantile(area, quantiles), 0.2 + 0.4 * quantiles, atol=0.02)
    aspect = np.log(width / height) / np.log(4 / 3)
    np.testing.assert_allclose(np.quantile(aspect, quantiles), 2 * quantiles - 1, atol=0.06)
    for offset, room in ((left, 1000 - width), (top, 1000 - height)):
        share = (offset + 0.5) / (room + 1)
        np.testing.assert_allclose(np.quantile(share, quantiles), quantiles, atol=0.04)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (40, 40, None)],
)
def test_crop_falls_back_to_the_centre(width, height, expected):
    """No crop of the whole area fits a very long picture."""
    box = crop_box(width, height, np.random.default_rng(0), scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    if expected is None:
        assert box[2] <= 40 and box[3] <= 40
    else:
        assert box == expected


def test_horizontal_flip(pixels):
    flipped = np.asarray(horizontal_flip(Image.fromarray(pixels)))
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])


def test_pictures_of_the_right_size_pass_untouched(pixels):
    rng = np.random.default_rng(0)
    plain = ImageTransform((30, 50), train=True, crop_scale=None, flip=False, randaugment=False)
    assert plain(pixels, rng) is pixels
    assert ImageTransform((30, 50))(pixels, None) is pixels
    resized = ImageTransform((20, 24))(pixels, None)
    np.testing.assert_allclose(resized, bicubic_reference(pixels, 20, 24), atol=ROUNDING)


def test_training_transform_flips_half_and_is_deterministic(pixels):
    flip = ImageTransform((30, 50), train=True, crop_scale=None, flip=True, randaugment=False)
    flipped = 0
    for seed in range(200):
        result = flip(pixels, np.random.default_rng(seed))
        is_flipped = np.array_equal(result, pixels[:, ::-1])
        assert is_flipped or np.array_equal(result, pixels)
        flipped += is_flipped
    assert 70 < flipped < 130
    full = ImageTransform((16, 16), train=True)
    results = [full(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert results[0].shape == (16, 16, 3) and results[0].dtype == np.uint8
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="size"):
        ImageTransform((0, 16))
    with pytest.raises(ValueError, match="crop_scale"):
        ImageTransform((16, 16), crop_scale=(0.0, 1.0))
