"""Which pictures are packed as they are, and what becomes of larger ones."""

import io

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.decoding import decode_image
from mplug_jax.data.packing.images import packed_picture
from mplug_jax.data.records import BadSample


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 200 // height, columns * 200 // width, rows * 0 + 90], -1).astype(
        np.uint8
    )


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_small_pictures_stay_the_bytes_they_were(tmp_path):
    content = encoded(Image.fromarray(smooth(30, 40)), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for image in (content, str(path)):
        packed, pixels = packed_picture(image, max_side=40, quality=90)
        assert packed == content
        np.testing.assert_array_equal(pixels, smooth(30, 40))
    array = smooth(30, 40)
    assert packed_picture(array, 40, 90)[0] is array


@pytest.mark.parametrize(("shape", "size"), [((300, 400), (96, 128)), ((900, 4), (128, 1))])
def test_larger_ones_become_jpegs_of_that_side(shape, size):
    content = encoded(Image.fromarray(smooth(*shape)), "PNG")
    packed, pixels = packed_picture(content, max_side=128, quality=95)
    assert Image.open(io.BytesIO(packed)).format == "JPEG"
    assert pixels.shape[:2] == size
    assert np.abs(decode_image(packed).astype(int) - pixels).mean() < 4
    np.testing.assert_allclose(pixels.mean((0, 1)), smooth(*shape).mean((0, 1)), atol=2)


def test_pictures_turned_by_exif_are_packed_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(smooth(300, 400)), "JPEG", exif=exif)
    packed, _ = packed_picture(content, max_side=200, quality=95)
    opened = Image.open(io.BytesIO(packed))
    assert opened.size == (150, 200) and not dict(opened.getexif())
    turned = np.rot90(smooth(300, 400), 3)[::2, ::2]
    assert np.abs(decode_image(packed).astype(int) - turned).mean() < 3


def test_unusable_ones_are_named(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_text("404 Not Found")
    for image in (str(path), str(tmp_path / "lost.jpg")):
        with pytest.raises(BadSample, match=rf"{image}: (cannot be decoded|cannot be read: No)"):
            packed_picture(image, 64, 90)
