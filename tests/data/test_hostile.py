"""What becomes of broken and hostile pictures and texts: used, or skipped with the reason.

The table in docs/data.md, "What happens to broken data", says the same.
"""

import importlib.util
import io
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.cleaning import pre_caption, pre_question
from mplug_jax.data.examples import PretrainExamples
from mplug_jax.data.records import BadSample
from mplug_jax.data.task_examples import PhraseExamples, PictureExamples
from mplug_jax.data.tokenizers import (
    CACHED_LENGTH,
    SentencePieceTokenizer,
    WordCache,
    WordPieceTokenizer,
    train_sentencepiece,
)
from mplug_jax.data.transforms import ImageTransform, decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
PNG, JPEG = "PNG", "JPEG"


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(width, height, rows: bytes, depth=8, colour=2, extra=b"") -> bytes:
    """A PNG written by hand; `rows` are its scan lines, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def png16(samples: np.ndarray, colour: int) -> bytes:
    """16 bits a sample: [H, W] with colour 0, [H, W, 3] with colour 2."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(samples.shape[1], samples.shape[0], rows, depth=16, colour=colour)


def ico_of(content: bytes) -> bytes:
    """An icon that says 16 x 16 and holds another picture."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + content


def gif_of(width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height)
    image = b"\x2c\0\0\0\0" + size + b"\0" + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + size + b"\0\0\0" + image + b"\x3b"


HUGE = png(30_000, 30_000, b"\0")
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
PROFILE_BOMB = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))
ROWS = (b"\0" + b"\x07" * 6) * 2
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"

UNUSABLE = {
    "truncated JPEG": (encoded(PICTURE, JPEG)[:-200], "cannot be decoded"),
    "truncated PNG": (encoded(PICTURE, PNG)[:300], "cannot be decoded"),
    "header alone": (encoded(PICTURE, PNG)[:33], "cannot be decoded"),
    "zero bytes": (b"", "the file is empty"),
    "HTML": (b"<!doctype html><title>404 Not Found</title>", "cannot be decoded"),
    "JSON": (b'{"error": "not found"}', "cannot be decoded"),
    "PostScript": (EPS, "PostScript program, which is not run"),
    "30,000 x 30,000": (HUGE, "cannot be decoded: Image size"),
    "10,000 x 10,000": (png(10_000, 10_000, b"\0"), "10000x10000 pixels are more than"),
    "huge GIF": (gif_of(65_535, 65_535), "cannot be decoded: Image size"),
    "icon around a huge PNG": (ico_of(HUGE), "cannot be decoded: Image size"),
    "text chunk bomb": (png(2, 2, ROWS, extra=TEXT_BOMB), "cannot be decoded: Decompressed"),
    "colour profile bomb": (png(2, 2, ROWS, extra=PROFILE_BOMB), "cannot be decoded: Decompressed"),
    "floating point": (encoded(Image.new("F", (4, 4)), "TIFF"), "no agreed range"),
}


FAST_DECODER = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("simplejpeg", "cv2"))),
    reason="the fast decoder's packages are missing: pip install 'mplug_jax[fast]'",
)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decoder", ["pillow", pytest.param("fast", marks=FAST_DECODER)])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_pictures_that_are_skipped(kind, decoder, tmp_path):
    content, reason = UNUSABLE[kind]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    transform = ImageTransform((8, 8), train=True, decoder=decoder)
    for load in (decode_image, lambda image: transform(image, np.random.default_rng(0))):
        with pytest.raises(BadSample, match=reason) as raised:
            load(path)
        assert str(path) in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decoder", ["pillow", pytest.param("fast", marks=FAST_DECODER)])
@pytest.mark.parametrize("kind", [kind for kind in UNUSABLE if re.search("bomb|000|huge", kind)])
def test_bombs_are_not_decoded(kind, decoder, monkeypatch):
    """Neither the pixels of those with too many, nor the pixels of those with other loads."""
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size))
    transform = ImageTransform((8, 8), train=True, decoder=decoder)
    started = time.perf_counter()
    with pytest.raises(BadSample):
        transform(UNUSABLE[kind][0], np.random.default_rng(0))
    assert decoded == [] and time.perf_counter() - started < 5.0


def test_pixels_after_the_last_are_not_read():
    content = png(2, 2, ROWS + bytes(50_000_000))
    np.testing.assert_array_equal(decode_image(content), np.full((2, 2, 3), 7))


def test_missing_pictures_and_folders_are_skipped(tmp_path):
    with pytest.raises(BadSample, match="no such file"):
        decode_image(tmp_path / "lost.jpg")
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(tmp_path)
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image("a\0.jpg")


@pytest.mark.parametrize("decoder", ["pillow", pytest.param("fast", marks=FAST_DECODER)])
def test_a_picture_without_a_path_is_named_by_its_record(decoder, tmp_path):
    """Tars, shards and TFDS hand out bytes, of which the id alone says where they come from."""
    (tmp_path / "a.jpg").write_bytes(b"404")
    box = {"phrase": "it", "box": [0.1, 0.1, 0.9, 0.9]}
    record = {"id": "00000.tar/17", "image_id": 0, "phrases": [box]}
    plain = ImageTransform((8, 8), train=True, decoder=decoder)
    for make in (PictureExamples(plain), PhraseExamples(None, BoxTransform((8, 8)), 8)):
        for image, said in (
            (b"404", r"00000\.tar/17: <3 bytes>: cannot be decoded"),
            (np.zeros((2, 2)), r"00000\.tar/17: <array>: float64 \[2, 2\] is no uint8"),
            (str(tmp_path / "a.jpg"), rf"{tmp_path}/a\.jpg: cannot be decoded"),
        ):
            with pytest.raises(BadSample, match=f"^{said}"):
                make({**record, "image": image}, np.random.default_rng(0))
    clip = {**record, "image": np.zeros(3), "video": np.zeros((2, 2, 2, 3))}
    with pytest.raises(BadSample, match=r"^00000\.tar/17: <array>: float64 .* no uint8 clip"):
        PictureExamples(plain, frames=2)(clip)


def test_16_bits_a_sample_keep_their_high_byte():
    grey = np.array([[0, 255, 256], [300, 32768, 65535]])
    expected = np.repeat((grey // 256)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(png16(grey, colour=0)), expected)
    colour = np.random.default_rng(1).integers(0, 65_536, (3, 4, 3))
    np.testing.assert_array_equal(decode_image(png16(colour, colour=2)), colour // 256)


def test_cmyk_and_grey_jpegs_are_used():
    # Ink of one colour takes that colour's complement away.
    for ink, left in enumerate([(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0)]):
        inks = [255 if i == ink else 0 for i in range(4)]
        picture = decode_image(encoded(Image.new("CMYK", (16, 16), tuple(inks)), JPEG, quality=95))
        assert np.abs(picture.astype(int) - left).max() < 12
    grey = decode_image(encoded(Image.new("L", (16, 16), 90), JPEG, quality=95))
    assert grey.shape == (16, 16, 3) and np.abs(grey.astype(int) - 90).max() <= 2


def test_palettes_lose_their_transparency():
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([200, 10, 20, 30, 40, 250])
    colours = np.array([[200, 10, 20], [30, 40, 250]])
    for transparency in (0, b"\x00\x80"):
        decoded = decode_image(encoded(palette, PNG, transparency=transparency))
        np.testing.assert_array_equal(decoded, colours[[[0, 1], [1, 0]]])


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_animations_the_first_frame_is_used(form):
    if form == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    np.testing.assert_array_equal(decode_image(content), np.full((6, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize(("tag", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_rotated_by_exif(tag, turn):
    exif = Image.Exif()
    exif[0x0112] = tag
    np.testing.assert_array_equal(
        decode_image(encoded(PICTURE, PNG, exif=exif)), np.rot90(PIXELS, turn)
    )


@pytest.mark.parametrize("tag", [b"Exif\0\0nothing", b"II*\0\xff\xff\xff\xff", b"\x01\x12"])
def test_a_damaged_exif_tag_is_passed_over(tag):
    np.testing.assert_array_equal(decode_image(encoded(PICTURE, PNG, exif=tag)), PIXELS)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3)])
@pytest.mark.parametrize("train", [False, True])
def test_a_single_pixel_and_lines_are_used(shape, train):
    content = encoded(Image.fromarray(np.full(shape, 90, np.uint8)), PNG)
    transform = ImageTransform((32, 32), train=train, crop_scale=(0.2, 1.0), randaugment=False)
    for seed in range(4):
        picture = transform(decode_image(content), np.random.default_rng(seed))
        np.testing.assert_array_equal(picture, np.full((32, 32, 3), 90))


def test_the_content_counts_not_the_extension(tmp_path):
    for name, form in (("a.jpg", PNG), ("a.png", "BMP"), ("a.txt", PNG), ("noextension", PNG)):
        path = tmp_path / name
        path.write_bytes(encoded(PICTURE, form))
        np.testing.assert_array_equal(decode_image(path), PIXELS)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    # Some of what a vocabulary must survive being trained on, too.
    texts = ["a red square", "null \0 and \x1b", "tab\tin between", "שלום", "x " * 10_000]
    train_sentencepiece(texts * 3, path, 64)
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "a", "red", "square", "שלום"]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return WordPieceTokenizer(path)


@pytest.fixture(params=["sentencepiece", "wordpiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


CAPTIONS = {
    "10,000 words": "red " * 10_000,
    "control characters": "a\0 \x01red\x1b[2J \x7fsquare\r\n\x1c a",
    "right to left": "שלום \u202ered",
    "emoji": "a 🐶 👩\u200d👩\u200d👧 red",
    "unusual spaces": "a\u00a0red\u2003square\u3000a",
    "one word of 100,000 letters": "a" * 100_000,
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_odd_captions_are_used(kind, tokenizer):
    make_example = PretrainExamples(tokenizer, ImageTransform((8, 8)), 12, 12)
    record = {"id": "a", "image": PIXELS, "image_id": 0, "captions": [CAPTIONS[kind]]}
    example = make_example(record, np.random.default_rng(0))
    ids, mask = example["text_ids"], example["text_mask"]
    assert ids.shape == (12,) and ids.max() < tokenizer.vocab_size and ids.min() >= 0
    assert 3 <= mask.sum() <= 12 and not ids[mask][1:-1].tolist().count(tokenizer.sep_id)
    assert (ids[0], ids[mask][-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    text = tokenizer.decode(ids[mask])
    assert text and not set(text) & set("\0\x01\x1b\x7f")
    if kind == "10,000 words":
        assert set(text.split()) == {"red"} and mask.all()


@pytest.mark.parametrize("caption", ["\u200b", "\x01", "\0\x02"])
def test_captions_of_nothing_to_read_are_skipped(caption, wordpiece):
    make_example = PretrainExamples(wordpiece, ImageTransform((8, 8)), 12, 12)
    record = {"id": "a", "image": PIXELS, "image_id": 0, "captions": [caption]}
    with pytest.raises(BadSample, match=r"a: caption .* has no words"):
        make_example(record, np.random.default_rng(0))


def test_special_tokens_in_a_caption_are_text(tokenizer):
    ids, mask = tokenizer.encode("[SEP] [CLS] [MASK] </s>", 64)
    special = {tokenizer.sep_id, tokenizer.cls_id, tokenizer.mask_id, tokenizer.pad_id}
    assert not special & set(ids[mask][1:-1].tolist())


def test_a_vocabulary_keeps_its_numbers_past_odd_tokens(wordpiece):
    assert wordpiece.vocab_size == 10
    assert wordpiece.words("red square") == [[7], [8]]


def test_enormous_words_are_not_remembered():
    asked = []
    cache = WordCache(lambda word: asked.append(word) or [1])
    for word in ("short", "a" * CACHED_LENGTH, "a" * (CACHED_LENGTH + 1)):
        assert cache(word) == cache(word) == [1]
    assert list(map(len, asked)) == [5, CACHED_LENGTH, CACHED_LENGTH + 1, CACHED_LENGTH + 1]


def test_cleaning_is_bounded_and_keeps_other_scripts():
    assert pre_caption("Red, " * 10_000, 30) == " ".join(["red"] * 30)
    assert pre_question("Red? " * 10_000, 30) == " ".join(["red"] * 30)
    assert pre_caption("שלום 🐶!", 30) == "שלום 🐶"
    assert pre_caption("", 30) == pre_question("", 30) == ""
    started = time.perf_counter()
    pre_caption(" " * 1_000_000 + "a", 30)
    assert time.perf_counter() - started < 5.0
