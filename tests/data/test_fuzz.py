"""Damaged files of every kind end in an example, a BadSample or a SourceError, and in no other way.

Files are damaged in two ways: bytes are changed, cut and repeated anywhere, and values of JSON and
of records are replaced by others of any type.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import tarfile

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.examples import PretrainExamples
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import build_source
from mplug_jax.data.sources.array_records import decode_record, encode_record
from mplug_jax.data.task_examples import (
    EntailmentExamples,
    PairExamples,
    PhraseExamples,
    QuestionExamples,
)
from mplug_jax.data.tokenizers import WordPieceTokenizer
from mplug_jax.data.transforms import ImageTransform
from tests.data.sources.test_array_records import write_shard

FAST = all(map(importlib.util.find_spec, ("simplejpeg", "cv2")))
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
SIZE = (8, 8)
# Derandomised: the same damages every time.
few = settings(max_examples=20, derandomize=True, deadline=None, database=None)

# The published form of each format: (kind, other keys of the spec, content).
ROW = {"image": "a.png"}
BOX = [0.1, 0.2, 0.5, 0.9]
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
}
QUESTION = {"image_id": 42, "question": "what is it?", "question_id": 42000}
OWN = {
    **ROW,
    "image_id": 17,
    "captions": ["a dog", "a cat"],
    "questions": [{"question": "what?", "answers": {"dog": 0.9}, "question_id": 1}],
    "phrases": [{"phrase": "the dog", "box": BOX, "type": "animal"}],
}
KARPATHY = {"filepath": "x", "filename": "../a.png", "sentences": [{"raw": "a dog"}], "cocoid": 3}
VQA = {**ROW, "question": "what?", "question_id": 5, "answer": ["dog", "cat"]}
VQA |= {"ocr": [[[0, 0], "STOP"]], "object_label": "dog&&cat"}
NLVR2 = {"sentence": "two dogs", "identifier": "dev-1-0-0", "label": "True", "directory": 7}
SNLI = {"Flickr30K_ID": "1", "pairID": "1#2", "sentence2": "a dog", "gold_label": "neutral"}
REFS = [{"ref_id": 0, "ann_id": 5, "image_id": 1, "split": "val", "sentences": [{"sent": "it"}]}]
BOXES = {
    "images": [{"id": 1, "file_name": "a.png", "width": 24, "height": 16}],
    "annotations": [{"id": 5, "image_id": 1, "bbox": [1, 2, 9, 8]}],
}
FORMATS = {
    "karpathy": ("captions", {"split": "val"}, {"images": [{**KARPATHY, "split": "val"}]}),
    "coco": ("captions", {}, COCO),
    "sentences": ("captions", {}, [KARPATHY]),
    "retrieval": ("retrieval", {}, [{**ROW, "caption": ["a dog"], "image_id": "coco_1"}]),
    "vqa": ("vqa", {}, [VQA, {**VQA, "answer": {"dog": 0.5}}]),
    "vqa v2": ("vqa", {"image_name": "a{image_id}.png"}, {"questions": [QUESTION]}),
    "visual genome": ("vqa", {}, [{"id": 1, "qas": [{**QUESTION, "qa_id": 3, "answer": "dog"}]}]),
    "grounding": ("grounding", {}, [{**ROW, "phrase": "the dog", "box": BOX}]),
    "transvg": ("grounding", {}, [["a.png", "mask.png", [1, 2, 9, 8], "the dog", ["r1"]]]),
    "nlvr2": ("nlvr2", {}, [NLVR2]),
    "nlvr2 rows": ("nlvr2", {}, [{"images": ["a.png", "b.png"], "sentence": "a", "label": True}]),
    "snli_ve": ("snli_ve", {}, [SNLI]),
    "snli_ve rows": ("snli_ve", {}, [{**ROW, "sentence": "a dog", "label": "neutral"}]),
    "own": ("jsonl", {}, [OWN, OWN]),
    "refer": ("refer", {"instances": "instances.json"}, REFS),
    "clips": ("video", {}, [{"video": "clip", "captions": ["a dog"]}]),
    "msrvtt": ("video", {}, [{"clip_name": "clip", "caption": "a dog"}]),
    "video qa": ("video", {}, [{"video_id": "clip", "question": "what?", "answer": "dog"}]),
    "vatex": ("video", {}, [{"videoID": "clip", "enCap": ["a dog", "a cat"]}]),
}

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 10**400, 1e308, float("nan"), float("inf"), "", "[", [], {}]),
    st.sampled_from(["../../a.png", "/etc/passwd", "a\0b", "x" * 5000, "\ud83d", "gs://a/b", "אב"]),
    st.text(max_size=4),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=4),
)


def places(value, before=()):
    """The path of every value within a value."""
    yield before
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*before, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def odd(draw, value):
    """A value with one or two of its parts replaced."""
    for _ in range(draw(st.integers(1, 2))):
        value = replaced(value, draw(st.sampled_from(list(places(value)))), draw(odd_values))
    return value


@st.composite
def damaged(draw, content):
    """Bytes some of which are changed, cut out, put in or repeated."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(start + draw(st.sampled_from([0, 1, 2, 4, 60])), len(content))
        new = draw(st.one_of(st.binary(max_size=4), st.just(bytes(content[start:end]) * 2)))
        content[start:end] = new
    return bytes(content[: draw(st.sampled_from([len(content), len(content) // 2])) or None])


def encoded(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The pictures that the formats name, a folder of frames, and a vocabulary."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b", "a42", "clip/1", "7/dev-1-0-img0", "7/dev-1-0-img1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(encoded("PNG"))
    (folder / "1.jpg").write_bytes(encoded("JPEG"))
    (folder / "instances.json").write_text(json.dumps(BOXES))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "what"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.fixture(scope="module")
def makers(root):
    """One maker for each kind of text that a record may have."""
    tokenizer = WordPieceTokenizer(root / "vocab.txt")
    transform = ImageTransform(SIZE, train=True)
    return {
        "captions": PretrainExamples(tokenizer, transform, 8, 8),
        "questions": QuestionExamples(tokenizer, transform, 8, 8, 2),
        "phrases": PhraseExamples(tokenizer, BoxTransform(SIZE, True, (0.5, 1.0), True), 8),
        "pair": PairExamples(tokenizer, transform, 8),
        "entailment": EntailmentExamples(tokenizer, transform, 8),
    }


def use(makers, read) -> int:
    """Makes every example that a record allows, and counts them; BadSample is an outcome."""
    made = 0
    with contextlib.suppress(BadSample):
        record = read()
        for key in makers.keys() & record.keys():
            with contextlib.suppress(BadSample):
                example = makers[key](record, np.random.default_rng(0))
                assert example["image"].dtype == np.uint8 and example["image"].shape[-3:-1] == SIZE
                made += 1
    return made


def use_source(makers, spec, root) -> int:
    """Builds a source, uses its records and counts the examples; SourceError is an outcome."""
    made = 0
    with contextlib.suppress(SourceError):
        source = build_source(spec, root, max_bad_fraction=1.0)
        for index in range(len(source)):
            made += use(makers, lambda index=index: source[index])
    return made


@pytest.mark.parametrize("form", FORMATS)
def test_annotations_with_odd_values_and_damaged_bytes(form, root, makers):
    kind, keys, content = FORMATS[form]
    spec = {"kind": kind, "path": "data.json", **keys}
    lines = "\n".join(map(json.dumps, content if isinstance(content, list) else [content]))

    def check(data: bytes) -> int:
        (root / "data.json").write_bytes(data)
        return use_source(makers, spec, root)

    @few
    @given(odd(content))
    def with_odd_values(value):
        check(json.dumps(value).encode())

    @few
    @given(damaged(json.dumps(content).encode()), damaged(lines.encode()))
    def with_damaged_bytes(document, rows):
        check(document)
        check(rows)

    assert check(json.dumps(content).encode()), "undamaged, it makes examples"
    with_odd_values()
    with_damaged_bytes()


@few
@given(damaged(pickle.dumps(REFS)), odd(REFS), odd(BOXES))
def test_refers_files(root, makers, content, references, boxes):
    spec = {"kind": "refer", "path": "refs.p", "instances": "boxes.json"}
    for data, instances in ((content, BOXES), (pickle.dumps(references), boxes)):
        (root / "refs.p").write_bytes(data)
        (root / "boxes.json").write_text(json.dumps(instances))
        use_source(makers, spec, root)


SHARD_RECORD = msgpack.unpackb(
    encode_record(
        {
            **OWN,
            "id": "a",
            "image": PIXELS,
            "pair": {"image2": PIXELS, "sentence": "a dog", "label": True},
            "entailment": {"hypothesis": "a dog", "label": "neutral"},
        }
    )
)


@settings(few, max_examples=80)
@given(odd(SHARD_RECORD), st.sampled_from(["video", "features", "clip", "transforms", "new"]))
def test_records_of_shards(makers, value, key):
    assert use(makers, lambda: decode_record(msgpack.packb(SHARD_RECORD))) == 5
    for odd_record in (value, {**SHARD_RECORD, key: value}):
        try:
            content = msgpack.packb(odd_record)
        except (ValueError, OverflowError):  # nothing that a file could hold
            continue
        use(makers, lambda content=content: decode_record(content))


@few
@given(data=st.data())
def test_shards(root, makers, data):
    whole = root / "whole.array_record"
    if not whole.exists():
        write_shard(whole, [encode_record({**OWN, "id": "a", "image": PIXELS})] * 3)
        assert use_source(makers, {"kind": "arrayrecord", "path": str(whole)}, root) == 9
    (root / "data.array_record").write_bytes(data.draw(damaged(whole.read_bytes())))
    use_source(makers, {"kind": "arrayrecord", "path": "data.array_record"}, root)


def tar_of(files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SAMPLES = [("1.png", encoded("PNG")), ("1.txt", b"a dog"), ("2.jpg", encoded("JPEG"))]
SAMPLES += [("2.json", b'{"caption": "a dog"}')]


@settings(few, max_examples=25)
@given(content=damaged(tar_of(SAMPLES)[:6144]), name=st.text(min_size=1, max_size=6))
def test_tars(root, makers, content, name):
    folder = root / "tars"
    for data in (content, tar_of([(name, b"a dog"), (f"{name}.jpg", b""), *SAMPLES])):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "0.tar").write_bytes(data)
        use_source(makers, {"kind": "webdataset", "path": "tars"}, root)
        assert sorted(os.listdir(folder)) in (["0.tar"], ["0.tar", "0.tar.index"])


PICTURES = {
    "JPEG": encoded("JPEG", quality=90),
    "progressive": encoded("JPEG", progressive=True),
    "PNG": encoded("PNG"),
    "GIF": encoded("GIF"),
    "TIFF": encoded("TIFF", compression="tiff_lzw"),
    "WEBP": encoded("WEBP"),
    "BMP": encoded("BMP"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "decoder",
    [
        "pillow",
        pytest.param(
            "fast",
            marks=pytest.mark.skipif(not FAST, reason="pip install 'mplug_jax[fast]' is missing"),
        ),
    ],
)
@pytest.mark.parametrize("form", PICTURES)
def test_pictures(form, decoder):
    transform = ImageTransform(SIZE, train=True, decoder=decoder)

    @settings(few, max_examples=80 if form == "JPEG" else 20)
    @given(damaged(PICTURES[form]))
    def with_damaged_bytes(content):
        try:
            pixels = transform(content, np.random.default_rng(0))
        except BadSample as error:
            assert str(error).startswith(f"<{len(content)} bytes>: ")
        else:
            assert pixels.shape == (*SIZE, 3) and pixels.dtype == np.uint8

    with_damaged_bytes()
