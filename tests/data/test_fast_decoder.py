"""The fast decoder against the exact one: the same crops and refusals, nearly the same pixels."""

import importlib.util
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mplug_jax.config import ConfigError, config_errors, defaults
from mplug_jax.data import decoding
from mplug_jax.data.decoding import decode_image, decode_part
from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import ImageTransform, fast_resize
from mplug_jax.validation import validate

INSTALLED = all(map(importlib.util.find_spec, ("simplejpeg", "cv2")))
needs_packages = pytest.mark.skipif(
    not INSTALLED, reason="the fast decoder's packages are missing: pip install 'mplug_jax[fast]'"
)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shading, soft-edged objects of other colours, and a little grain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    scene = 120 + 60 * np.stack([np.sin(3 * rows + i) * np.cos(4 * columns) for i in range(3)], -1)
    for _ in range(20):
        y, x, radius = rng.uniform((0, 0, 0.03), (1, 1, 0.2))
        distance = np.hypot(rows - y, columns - x) / radius
        alpha = np.clip((1 - distance) * radius * 80, 0, 1)[..., None]
        scene = scene * (1 - alpha) + rng.uniform(20, 235, 3) * alpha
    return (scene + rng.normal(0, 2, scene.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def both(size=(64, 64), **settings):
    return [
        ImageTransform(size, train=True, decoder=name, **settings) for name in ("pillow", "fast")
    ]


def apart(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(int) - right).mean())


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of what the fast decoder has decoded."""
    shapes = []
    original = decoding._decode_jpeg

    def spy(opened, shrink):
        pixels = original(opened, shrink)
        shapes.append(None if pixels is None else pixels.shape[:2])
        return pixels

    monkeypatch.setattr(decoding, "_decode_jpeg", spy)
    return shapes


@needs_packages
@pytest.mark.parametrize("randaugment", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"), [((120, 160), (64, 64)), ((375, 500), (256, 256)), ((700, 900), (96, 64))]
)
def test_pixels_are_near_and_what_is_drawn_is_the_same(shape, size, randaugment):
    """With another crop or flip the difference would be tens of grey levels."""
    content = encoded(Image.fromarray(photo(*shape)), quality=85)
    exact, fast = both(size, crop_scale=(0.2, 1.0), randaugment=randaugment)
    for seed in range(12):
        left, right = np.random.default_rng(seed), np.random.default_rng(seed)
        one, two = exact(content, left), fast(content, right)
        assert two.shape == (*size, 3) and two.dtype == np.uint8
        assert apart(one, two) < (8 if randaugment else 4)
        assert apart(one, two[:, ::-1]) > 10
        assert left.bit_generator.state == right.bit_generator.state


@needs_packages
@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [
        ((400, 600), 200, 2),
        ((400, 600), 201, 1),
        ((401, 601), 100, 4),
        ((401, 603), 40, 8),
        ((99, 99), 100, 1),
    ],
)
def test_decodes_at_the_smallest_sufficient_scale(shape, size, scale, decoded):
    content = encoded(Image.fromarray(photo(*shape)), quality=90)
    exact, fast = both((size, size), crop_scale=None, flip=False, randaugment=False)
    result = fast(content, np.random.default_rng(0))
    assert decoded == [(-(-shape[0] // scale), -(-shape[1] // scale))]
    assert apart(result, exact(content, np.random.default_rng(0))) < 4


@needs_packages
def test_a_part_lies_where_it_was_drawn():
    """Each quarter has a colour of its own."""
    quarters = np.zeros((640, 640, 3), np.uint8)
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (180, 180, 40)]
    corners = [(0, 0), (320, 0), (0, 320), (320, 320)]
    for (left, top), colour in zip(corners, colours, strict=True):
        quarters[top : top + 320, left : left + 320] = colour
    content = encoded(Image.fromarray(quarters), quality=95)
    for (left, top), colour in zip(corners, colours, strict=True):
        box = (left, top, 320, 320)
        pixels, (x, y, w, h) = decode_part(content, lambda *_, box=box: box, (40, 40))
        assert pixels.shape == (80, 80, 3) and (w, h) == (40, 40)
        part = pixels[y : y + h, x : x + w].reshape(-1, 3)
        np.testing.assert_allclose(part.mean(0), colour, atol=6)


@needs_packages
def test_averages_what_shrinks_much_and_interpolates_the_rest():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_array_equal(fast_resize(stripes, (16, 16)), np.full((16, 16, 3), 100))
    # One axis shrinks and the other grows: no stripe may be picked out here, either.
    np.testing.assert_allclose(fast_resize(stripes, (100, 16)), 100, atol=1)
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    grown = fast_resize(ramp, (20, 40))[0, :, 0]
    np.testing.assert_allclose(grown[1:-1], 10 * (np.arange(1, 39) + 0.5) / 2 - 5, atol=1)
    assert fast_resize(ramp, (20, 20)) is ramp


def cases():
    picture = Image.fromarray(photo(60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.random.default_rng(0).integers(0, 65_536, (60, 80)).astype(np.uint16)
    return {
        "turned by EXIF": encoded(picture, exif=exif),
        "CMYK": encoded(picture.convert("CMYK")),
        "PNG": encoded(picture, "PNG"),
        "16 bits": encoded(Image.fromarray(deep), "PNG"),
        "palette": encoded(picture.quantize(16), "PNG", transparency=0),
        "alpha": encoded(picture.convert("RGBA"), "PNG"),
        "GIF": encoded(picture, "GIF"),
    }


@needs_packages
@pytest.mark.parametrize("kind", cases())
def test_what_only_pillow_can_do_is_its_own(kind, decoded):
    content = cases()[kind]
    pixels, box = decode_part(content, lambda width, height: (0, 0, width, height), (8, 8))
    expected = decode_image(content)
    np.testing.assert_array_equal(pixels, expected)
    assert box == (0, 0, expected.shape[1], expected.shape[0])
    assert decoded == []


@needs_packages
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"progressive": True}),
        ("RGB", {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}),  # damaged: upright
    ],
)
def test_other_jpegs_that_are_decoded_fast(mode, options, decoded):
    picture = Image.fromarray(photo(60, 80)).convert(mode)
    content = encoded(picture, quality=95, subsampling=0, **options)
    pixels, _ = decode_part(content, lambda width, height: (0, 0, width, height), (60, 80))
    assert decoded == [(60, 80)] and apart(pixels, decode_image(content)) < 3


@needs_packages
def test_paths_and_arrays(tmp_path):
    pixels = photo(60, 80)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(pixels)))
    exact, fast = both((32, 32))
    for image in (path, str(path), pixels):
        one, two = (way(image, np.random.default_rng(5)) for way in (exact, fast))
        assert apart(one, two) < 8
    held_out = ImageTransform((32, 32), decoder="fast")(path, None)
    np.testing.assert_array_equal(held_out, ImageTransform((32, 32))(path, None))


@needs_packages
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (40_000, 2)])
def test_single_pixels_and_lines(shape):
    content = encoded(Image.fromarray(np.full((*shape, 3), 90, np.uint8)), quality=95)
    _, fast = both((32, 32), crop_scale=(0.2, 1.0), randaugment=False)
    for seed in range(4):
        picture = fast(content, np.random.default_rng(seed))
        np.testing.assert_allclose(picture, np.full((32, 32, 3), 90), atol=1)


@needs_packages
def test_files_that_libjpeg_complains_about_are_judged_by_pillow(decoded):
    """Of a file cut off, and of one with damage that Pillow puts up with."""
    content = bytearray(encoded(Image.fromarray(photo(120, 160)), quality=90))
    exact, fast = both()
    for cut in (len(content) - 500, 700):
        messages = []
        for way in (exact, fast):
            with pytest.raises(BadSample) as error:
                way(bytes(content[:cut]), np.random.default_rng(0))
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    decoded.clear()
    content[-600:-590] = b"\xff\x01" * 5
    one, two = (way(bytes(content), np.random.default_rng(0)) for way in (exact, fast))
    assert decoded == [None] and apart(one, two) < 8


@needs_packages
def test_enormous_files_are_left_to_pillow(monkeypatch, decoded):
    monkeypatch.setattr(decoding, "_MAX_JPEG", 1000)
    content = encoded(Image.fromarray(photo(120, 160)), quality=90)
    pixels, _ = decode_part(content, lambda *_: (0, 0, 8, 8), (8, 8))
    np.testing.assert_array_equal(pixels, decode_image(content))
    assert decoded == [None]


def test_a_missing_package_is_an_error_of_the_config(monkeypatch):
    def fail(name):
        raise ImportError(f"No module named {name!r}")

    decoding.fast_packages.cache_clear()
    monkeypatch.setattr(decoding.importlib, "import_module", fail)
    message = r"simplejpeg.*pip install 'mplug_jax\[fast\]'"
    with pytest.raises(ConfigError, match=message), config_errors():
        ImageTransform((8, 8), decoder="fast")
    ImageTransform((8, 8))
    decoding.fast_packages.cache_clear()


def test_unknown_decoders_are_refused():
    with pytest.raises(ValueError, match="decoder must be one of pillow, fast, not 'opencv'"):
        ImageTransform((8, 8), decoder="opencv")
    config = defaults("base")
    config.data.decoder = "opencv"
    with pytest.raises(ConfigError, match=r"data\.decoder='opencv' is unknown; choose pillow"):
        validate(config)


@needs_packages
def test_can_be_sent_to_workers():
    content = encoded(Image.fromarray(photo(60, 80)))
    fast = both()[1]
    sent = pickle.loads(pickle.dumps(fast))
    np.testing.assert_array_equal(*(way(content, np.random.default_rng(1)) for way in (fast, sent)))
