"""ArrayRecord shards made here."""

import io
import pickle

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import build_source
from mplug_jax.data.sources.array_records import decode_record, encode_record
from mplug_jax.data.transforms import decode_image

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(number: int, **more):
    pixels = np.full((2, 3, 3), number, np.uint8)
    captions = [f"caption {number}"]
    return {"id": f"r{number}", "image": pixels, "image_id": number, "captions": captions, **more}


def write_shard(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def arrayrecord(root, path):
    return build_source({"kind": "arrayrecord", "path": path}, root)


def test_everything_of_a_record_comes_back():
    whole = {
        "id": "vg/1",
        "image": PIXELS,
        "image_id": np.int32(7),
        "captions": ["a dög", "two"],
        "questions": [
            {
                "question": "who?",
                "answers": {"dog": 0.75, "cat": np.float64(0.25)},
                "question_id": 9,
            }
        ],
        "phrases": [{"phrase": "the dog", "box": np.array([0.0, 0.25, 0.5, 1.0])}],
        "pair": {"image2": png(PIXELS[::-1]), "sentence": "s", "label": True},
        "domain": "near-domain",
        "extra": None,
    }
    back = decode_record(encode_record(whole))
    np.testing.assert_array_equal(decode_image(back["image"]), PIXELS)
    np.testing.assert_array_equal(decode_image(back["pair"]["image2"]), PIXELS[::-1])
    assert back["pair"]["label"] is True
    assert back["image_id"] == 7 and back["captions"] == ["a dög", "two"]
    assert back["questions"] == [
        {"question": "who?", "answers": {"dog": 0.75, "cat": 0.25}, "question_id": 9}
    ]
    assert back["phrases"] == [{"phrase": "the dog", "box": [0.0, 0.25, 0.5, 1.0]}]
    assert back["domain"] == "near-domain" and back["extra"] is None
    assert back.keys() == whole.keys()


def test_a_picture_file_is_stored_as_it_is(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"whatever is in it")
    for image in (str(tmp_path / "a.jpg"), b"whatever is in it"):
        assert decode_record(encode_record(record(1, image=image)))["image"] == b"whatever is in it"
    with pytest.raises(BadSample, match=r"b\.jpg: cannot be read: No such file"):
        encode_record(record(1, image=str(tmp_path / "b.jpg")))


def test_what_cannot_be_encoded():
    with pytest.raises(BadSample, match="r1: is a clip"):
        encode_record(record(1, video="a.mp4"))
    with pytest.raises(BadSample, match="r1: cannot be encoded: set is no value"):
        encode_record(record(1, tags={"a"}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xc1", "no MessagePack"),
        (b"", "no MessagePack"),
        (msgpack.packb([1]), "is a list, not a map"),
        (
            msgpack.packb({"id": 3, "image": "a.jpg", "image_id": -1}),
            "id, image, image_id, captions",
        ),
        (encode_record(record(1)) + b"x", "no MessagePack"),
    ],
)
def test_what_is_no_record(content, reason):
    with pytest.raises(BadSample, match=reason):
        decode_record(content)


def test_shards_of_a_folder_in_order(tmp_path):
    write_shard(tmp_path / "a/train.array_record-00001-of-00002", map(encode_record, [record(2)]))
    write_shard(
        tmp_path / "a/train.array_record-00000-of-00002",
        map(encode_record, [record(0), record(1)]),
    )
    (tmp_path / "a/README").write_text("no shard")
    source = arrayrecord(tmp_path, "a")
    assert [item["id"] for item in source] == ["r0", "r1", "r2"]
    assert [decode_image(source[i]["image"])[0, 0, 0] for i in (2, 0, 1)] == [2, 0, 1]
    assert len(arrayrecord(tmp_path, "a/*-00001-of-*")) == 1
    again = pickle.loads(pickle.dumps(source))
    assert again[2]["captions"] == ["caption 2"]
    with pytest.raises(IndexError):
        source[3]


def test_a_damaged_record_is_bad_and_the_others_are_not(tmp_path):
    contents = [encode_record(record(i, captions=[f"caption {i} " * 50])) for i in range(3)]
    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1,uncompressed")
    for content in contents:
        writer.write(content)
    writer.close()
    file = bytearray((tmp_path / "x.array_record").read_bytes())
    file[file.index(b"caption 1 caption") + 5] ^= 255
    (tmp_path / "x.array_record").write_bytes(file)
    source = arrayrecord(tmp_path, "x.array_record")
    assert (source[0]["id"], source[2]["id"]) == ("r0", "r2")
    with pytest.raises(BadSample, match=r"x\.array_record: record 1 of the source: .*mismatch"):
        source[1]


def test_shards_that_cannot_be_used(tmp_path):
    write_shard(tmp_path / "a/0.array_record", [encode_record(record(0))])
    (tmp_path / "a/1.array_record").write_bytes(b"<html>" * 100)
    with pytest.raises(SourceError, match=r"a/1\.array_record: cannot be read as an ArrayRecord"):
        arrayrecord(tmp_path, "a")
    whole = (tmp_path / "a/0.array_record").read_bytes()
    (tmp_path / "cut.array_record").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="is it cut off"):
        arrayrecord(tmp_path, "cut.array_record")
    write_shard(tmp_path / "foreign.array_record", [b"\x0a\x05hello"])
    with pytest.raises(SourceError, match=r"foreign\.array_record: record 0 .*kind 'tfds'"):
        arrayrecord(tmp_path, "foreign.array_record")
    write_shard(tmp_path / "none.array_record", [])
    with pytest.raises(SourceError, match="no records in 1 shards"):
        arrayrecord(tmp_path, "none.array_record")
    with pytest.raises(SourceError, match=r"no match of a pattern"):
        arrayrecord(tmp_path, "missing")
    with pytest.raises(ValueError, match="no key 'max_bad_fraction'"):
        build_source({"kind": "arrayrecord", "path": "a", "max_bad_fraction": 0.1}, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captions": [3]}, "a caption is 3, not a text"),
        ({"captions": [" "]}, "a caption is empty"),
        ({"questions": [{"question": "what?", "answers": ["dog"]}]}, "answers is .* not an object"),
        ({"questions": [{"question": "what?", "answers": {"dog": -1}}]}, "no positive number"),
        ({"questions": [{"question": "what?", "ocr": [1]}]}, "ocr, objects or annotators hold"),
        ({"phrases": [{"phrase": "it", "box": [0.9, 0, 0.1, 1]}]}, "box .* is not x1 < x2"),
        ({"pair": {"image2": "/etc/passwd", "sentence": "a", "label": True}}, "no second picture"),
        ({"pair": {"image2": b"", "sentence": "a", "label": "yes"}}, "label is 'yes', not one of"),
        ({"entailment": {"hypothesis": "a"}}, "label is missing, not a text"),
    ],
)
def test_a_record_with_an_unusable_part_is_bad_and_named(change, said):
    content = msgpack.packb({**record(7), "image": b"x", **change})
    with pytest.raises(BadSample, match=f"^r7: .*{said}"):
        decode_record(content)


@pytest.mark.parametrize("key", ["video", "clip", "features"])
def test_a_shard_holds_no_clips_and_no_features(key):
    with pytest.raises(BadSample, match=f"has no usable {key}"):
        decode_record(msgpack.packb({**record(7), "image": b"x", key: "/etc/passwd"}))


def test_questions_as_the_sources_leave_them_are_usable():
    question = {"question": "what?", "answers": {}, "ocr": ["", "STOP"], "objects": ""}
    content = msgpack.packb({**record(7), "image": b"x", "questions": [question]})
    assert decode_record(content)["questions"] == [question]
