"""NLVR2 in both layouts."""

import pytest

from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

DEV = (
    {
        "sentence": "Two dogs are running.",
        "left_url": "https://x/l.png",
        "right_url": "https://x/r.png",
        "synset": "dog",
        "query": "dogs 3",
        "validation": {"1": "True"},
        "identifier": "dev-850-0-0",
        "label": "True",
    },
    {"sentence": "One dog.", "identifier": "dev-850-0-1", "label": "False"},
)
TRAIN = ({"sentence": "A cat.", "identifier": "train-10171-0-0", "label": "False", "directory": 7},)


def load(root, content, **spec):
    root.write("data.json", content)
    spec = {"kind": "nlvr2", "path": "data.json", "images": "images", **spec}
    return build_source(spec, root.path)


def test_published_rows(data_root):
    data_root.add_pictures("dev-850-0-img0.png", "dev-850-0-img1.png")
    source = load(data_root, DEV)
    folder = data_root.path / "images"
    assert [record["id"] for record in source] == ["dev-850-0-0", "dev-850-0-1"]
    assert {record["image"] for record in source} == {f"{folder}/dev-850-0-img0.png"}
    assert [record["image_id"] for record in source] == [0, 0]
    right = f"{folder}/dev-850-0-img1.png"
    assert [record["pair"] for record in source] == [
        {"image2": right, "sentence": "Two dogs are running.", "label": True},
        {"image2": right, "sentence": "One dog.", "label": False},
    ]
    assert source[0]["captions"] == []


def test_training_pictures_lie_in_numbered_folders(data_root):
    data_root.add_pictures("train/7/train-10171-0-img0.png", "train/7/train-10171-0-img1.png")
    [record] = load(data_root, TRAIN, images="images/train")
    folder = data_root.path / "images" / "train" / "7"
    assert record["image"] == f"{folder}/train-10171-0-img0.png"
    assert record["pair"]["image2"] == f"{folder}/train-10171-0-img1.png"


def test_rows_that_name_their_pictures(data_root):
    rows = [
        {"images": ["a.jpg", "sub/c.jpg"], "sentence": " Two. ", "label": label}
        for label in (True, "False", "True")
    ]
    for content in (rows, tuple(rows), tuple(rows[:1])):
        source = load(data_root, content)
        expected = [True, False, True][: len(content)]
        assert [record["pair"]["label"] for record in source] == expected
        assert source[0]["pair"]["sentence"] == "Two."
        assert source[0]["image"] == f"{data_root.path}/images/a.jpg"
        assert source[0]["pair"]["image2"] == f"{data_root.path}/images/sub/c.jpg"
    assert len({record["id"] for record in load(data_root, rows)}) == 3


BAD = {
    "sentence is empty": {"images": ["a.jpg", "b.jpg"], "sentence": "", "label": True},
    "label is 'maybe', not one of": {
        "images": ["a.jpg", "b.jpg"],
        "sentence": "x",
        "label": "maybe",
    },
    "images has 1 pictures, not 2": {"images": ["a.jpg"], "sentence": "x", "label": True},
    "images is 'a.jpg', not a list": {"images": "a.jpg", "sentence": "x", "label": True},
    "a picture of images is 3": {"images": ["a.jpg", 3], "sentence": "x", "label": True},
    "outside the folder": {"images": ["a.jpg", "../b.jpg"], "sentence": "x", "label": True},
    "not of the file's format": {"images": ["a.jpg", "b.jpg"], "sentence": "x"},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_counted(data_root, reason):
    good = {"images": ["a.jpg", "b.jpg"], "sentence": "x", "label": True}
    source = load(data_root, [good, BAD[reason]], max_bad_fraction=0.5)
    assert len(source) == 1
    [(where, found)] = source.bad_records
    assert where == f"{data_root.path}/data.json:1" and reason in found
    with pytest.raises(SourceError, match="1 of 2 records are bad"):
        load(data_root, [good, BAD[reason]])


def test_identifiers_that_name_no_pair(data_root):
    with pytest.raises(SourceError, match="identifier is 'dev-850', not of the form 'dev-850-0-0'"):
        load(data_root, ({"sentence": "x", "identifier": "dev-850", "label": "True"},))


def test_missing_pictures_and_other_layouts(data_root):
    with pytest.raises(SourceError, match=r"such as .*images/dev-850-0-img0\.png"):
        load(data_root, DEV)
    with pytest.raises(SourceError, match=r"no folder .*dev"):
        load(data_root, DEV, images="dev")
    with pytest.raises(SourceError, match="format 'retrieval', which a 'nlvr2' source"):
        load(data_root, [{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(SourceError, match="use kind 'nlvr2'"):
        load(data_root, DEV, kind="captions")
    with pytest.raises(SourceError, match=r"is none of .*NLVR2"):
        load(data_root, [{"left": "a.jpg", "right": "b.jpg"}])
