"""What becomes of broken and hostile annotations: used, skipped and counted, or an error before
training.

The table in docs/data.md, "What happens to broken data", says the same.
"""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mplug_jax.data.loading import LoadExample
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources.json_files import json_records
from mplug_jax.data.task_examples import PictureExamples
from mplug_jax.data.transforms import ImageTransform

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(text: str = "") -> bytes:
    """A PNG with a compressed text in it."""
    buffer, texts = io.BytesIO(), PngInfo()
    texts.add_text("comment", text, zip=True)
    PICTURE.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


# The second declares 30,000 x 30,000 pixels.
BROKEN = {
    "text chunk bomb": encoded("a" * 2_000_000),
    "huge": b"GIF89a" + 2 * (30_000).to_bytes(2, "little") + b"\0\0\0;",
    "HTML": b"<!doctype html><title>404 Not Found</title>",
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        PICTURE.save(tmp_path / "images" / name)
    return tmp_path


def read(root, content, kind="jsonl", **options):
    """Rows as JSON lines, a text or bytes as they are; every bad row is tolerated."""
    if isinstance(content, list):
        content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content)
    data = content if isinstance(content, bytes) else content.encode()
    (root / "data.json").write_bytes(data)
    options = {"images": "images", "max_bad_fraction": 1.0, **options}
    return json_records("data.json", kind, root, **options)


GOOD = {"image": "a.png", "captions": ["a red square"]}
BAD_ROWS = {
    "empty": ({**GOOD, "captions": [""]}, "caption 0 is empty"),
    "blank": ({**GOOD, "captions": [" \t\u2003"]}, "caption 0 is empty"),
    "no caption": ({**GOOD, "captions": []}, "there is no caption"),
    "captions a text": ({**GOOD, "captions": "a"}, "captions is 'a', not a list"),
    "caption a number": ({**GOOD, "captions": [3]}, "caption 0 is 3, not a text"),
    "image a number": ({**GOOD, "image": 3}, "image is 3, not a text"),
    "row a list": ([1, 2], "not of the file's format"),
    "row a number": ("7", "not of the file's format"),
    "cut": ('{"image": "a.png", "capt', "no JSON"),
    "nested": ('{"image": "a.png", "captions": ' + "[" * 100_000, "nested too deeply"),
    "digits": ('{"image": "a.png", "x": 1' + "0" * 5000 + "}", "too many digits"),
    "half a character": ('{"image": "a.png", "captions": ["\\ud83d"]}', "U\\+D83D, half"),
    "image_id too large": ({**GOOD, "image_id": 2**31}, "image_id is 2147483648"),
    "parent folders": ({**GOOD, "image": "../../etc/passwd"}, "lies outside the folder"),
    "its own folder": ({**GOOD, "image": "."}, "lies outside the folder"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "lies outside the folder"),
    "hidden ascent": ({**GOOD, "image": "x/../../images2/a.png"}, "lies outside the folder"),
}
BOXES = {
    "inverted": [0.6, 0.2, 0.3, 0.9],
    "without area": [0.2, 0.2, 0.2, 0.9],
    "outside": [1.2, 0.2, 1.6, 0.9],
    "in pixels": [12, 30, 200, 180],
    "negative": [-0.5, 0.2, 0.3, 0.9],
    "three numbers": [0.1, 0.2, 0.3],
    "a text": "0.1,0.2,0.3,0.4",
    "not finite": [0.1, 0.2, float("nan"), float("inf")],
    "beyond floats": [0.1, 0.2, 0.3, 10**400],
}
for name, box in BOXES.items():
    row = {"image": "a.png", "phrases": [{"phrase": "it", "box": box}]}
    BAD_ROWS[f"box {name}"] = (row, "box ")


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rows_that_are_skipped_and_counted(kind, root):
    row, reason = BAD_ROWS[kind]
    source = read(root, [GOOD, row, GOOD])
    assert [source[i]["captions"] for i in range(len(source))] == [["a red square"]] * 2
    ((where, said),) = source.bad_records
    assert where == f"{root}/data.json:2"
    assert re.search(reason, said)
    with pytest.raises(SourceError, match=r"1 of 3 records are bad.*data\.json:2"):
        read(root, [GOOD, row, GOOD], max_bad_fraction=0.01)


def test_good_rows_that_look_odd_are_used(root):
    inside = str(root / "images" / "a.png")
    box = {"phrase": "it", "box": [-0.0005, 0, 1.0005, 0.5]}
    rows = [
        GOOD,
        {**GOOD, "image": inside},
        {**GOOD, "image": "./x/../a.png", "unknown": {"a": [1]}},
        {**GOOD, "captions": ["", "a red square"]},
        {"image": "b.png", "phrases": [box]},
    ]
    source = read(root, "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))
    assert [source[i]["image"] for i in range(4)] == [inside] * 4
    assert source.bad_records == [(f"{root}/data.json:7", "caption 0 is empty")]
    assert source[3]["captions"] == ["a red square"]
    assert source[4]["phrases"][0]["box"] == [0.0, 0.0, 1.0, 0.5]


def test_records_of_one_id_or_picture(root):
    """Equal image_ids are one picture by definition; records are told apart all the same."""
    rows = [{**GOOD, "image_id": 5}, {**GOOD, "image": "b.png", "image_id": 5}]
    source = read(root, [*rows, rows[0]])
    assert [source[i]["image_id"] for i in range(3)] == [5, 5, 5]
    assert [source[i]["id"] for i in range(3)] == ["a.png", "b.png", "a.png#2"]
    twice = [{"image": "a.png", "question": f"{i}?", "question_id": 1} for i in range(2)]
    asked = read(root, json.dumps(twice), kind="vqa")
    assert [asked[i]["questions"][0]["question"] for i in range(2)] == ["0?", "1?"]


def test_two_pictures_of_one_id_in_coco(root):
    """The second is skipped: which of the two the captions mean cannot be known."""
    images = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]
    captions = [{"image_id": 1, "caption": "a red square"}]
    source = read(root, json.dumps({"images": images, "annotations": captions}), kind="captions")
    assert len(source) == 1 and source[0]["image"].endswith("a.png")
    where = f"{root}/data.json: images"
    assert source.bad_records == [(f"{where}[1]", f"its id 1 is that of {where}[0]")]


FILES = {
    "cut in an array": (
        '[{"image": "a.png", "captions": ["a"]},\n{"image": "b',
        r"line 2.*cut off",
    ),
    "cut in an object": ('{"images": [{"id": 1,', "was it cut off"),
    "empty": ("", "the file is empty"),
    "a picture": (encoded(), "is not a UTF-8 text file: line 1"),
    "invalid UTF-8": (
        b'{"image": "a.png"}\n{"captions": ["\xe9t\xe9"]}',
        "UTF-8 text file: line 2",
    ),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is not a UTF-8 text file: line 1"),
    "a number": ("17", "the format is none of"),
    "lists of texts": ('["a.png", "b.png"]', "the format is none of"),
    "nested": ("[" * 100_000, "line 1.*nested too deeply"),
    "digits": ('[{"image_id": 1' + "0" * 5000 + "}]", "line 1.*too many digits"),
    "no usable row": ([{**GOOD, "captions": [""]}], "no usable records.*caption 0 is empty"),
    "a name too long": (
        [{**GOOD, "image": "x" * 5000}],
        "none of the pictures looked for is there",
    ),
    "no picture there": (
        [{**GOOD, "image": "lost.png"}],
        "none of the pictures looked for is there",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_end_the_run_before_it_starts(kind, root):
    content, reason = FILES[kind]
    with pytest.raises(SourceError, match=rf"data\.json.*{reason}"):
        read(root, content)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([6, 4, 6, 8], [0.25, 0.25, 0.5, 0.75]),
        ([12, -4, 100, 12], [0.5, 0.0, 1.0, 0.5]),
        ([24, 0, 8, 8], None),
        ([-9, 0, 9, 8], None),
    ],
)
def test_boxes_in_pixels_are_cut_at_the_picture(box, expected, root):
    """Those wholly outside are skipped when they come up, since only then is the size known."""
    source = read(root, json.dumps([["a.png", "", box, "it", []]]), kind="grounding")
    if expected is None:
        with pytest.raises(BadSample, match=r"a\.png: a box lies outside its picture of 24x16"):
            source[0]
    else:
        assert source[0]["phrases"][0]["box"] == expected


@pytest.mark.parametrize("kind", BROKEN)
def test_boxes_in_pixels_of_broken_pictures_are_skipped(kind, root):
    (root / "images" / "a.png").write_bytes(BROKEN[kind])
    source = read(root, json.dumps([["a.png", "", [1, 1, 2, 2], "it", []]]), kind="grounding")
    with pytest.raises(BadSample, match=r"a\.png: cannot be opened for its size"):
        source[0]


def test_a_skipped_picture_is_replaced_and_counted(root, caplog):
    (root / "images" / "b.png").write_bytes(encoded()[:300])
    source = read(root, [GOOD, {**GOOD, "image": "b.png"}])
    make_example = PictureExamples(ImageTransform((16, 24)))
    example = LoadExample((source,), make_example, seed=0)((0, 0, 1))
    np.testing.assert_array_equal(example["image"], PIXELS)
    assert example["bad"] >= 1 and example["valid"]
    assert f"{root}/images/b.png: cannot be decoded" in caplog.text
    (root / "images" / "a.png").unlink()
    with pytest.raises(SourceError, match=r"20 records in a row could not be used.*png"):
        LoadExample((source,), make_example, seed=0)((0, 0, 1))
