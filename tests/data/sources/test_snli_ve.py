"""SNLI-VE in both layouts."""

import pytest

from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

LABELS = ("entailment", "neutral", "contradiction")


def published(number, label, picture="4705552913", **others):
    return {
        "annotator_labels": [label],
        "captionID": f"{picture}.jpg#2",
        "gold_label": label,
        "pairID": f"{picture}.jpg#2r{number}",
        "sentence1": "Two women are embracing.",
        "sentence2": f"Hypothesis {number}.",
        "Flickr30K_ID": picture,
        **others,
    }


def load(root, content, **spec):
    root.write("data.jsonl", content)
    spec = {"kind": "snli_ve", "path": "data.jsonl", "images": "images", **spec}
    return build_source(spec, root.path)


@pytest.fixture
def root(data_root):
    data_root.add_pictures("4705552913.jpg", "12.jpg")
    return data_root


def test_published_rows(root):
    rows = [published(i, label) for i, label in enumerate(LABELS)]
    source = load(root, (*rows, published(3, "neutral", picture=12)))
    assert [record["entailment"] for record in source] == [
        {"hypothesis": f"Hypothesis {i}.", "label": label}
        for i, label in enumerate((*LABELS, "neutral"))
    ]
    assert source[1]["id"] == "4705552913.jpg#2r1"
    assert [record["image_id"] for record in source] == [0, 0, 0, 1]
    assert source[0]["image"] == f"{root.path}/images/4705552913.jpg"
    assert source[3]["image"] == f"{root.path}/images/12.jpg"


def test_rows_without_a_gold_label_are_left_out_and_are_no_error(root):
    source = load(root, (published(0, "-"), published(1, "neutral"), published(2, "-")))
    assert [record["entailment"]["hypothesis"] for record in source] == ["Hypothesis 1."]
    assert source.left_out == 2 and source.bad_records == []
    with pytest.raises(SourceError, match="no usable records"):
        load(root, (published(0, "-"),))


def test_rows_of_mplug(root):
    rows = [{"image": "a.jpg", "sentence": f"{i}", "label": v} for i, v in enumerate(LABELS)]
    source = load(root, rows)
    assert [record["entailment"]["label"] for record in source] == list(LABELS)
    assert source[2]["entailment"]["hypothesis"] == "2"
    assert source[2]["image"] == f"{root.path}/images/a.jpg"


def test_bad_rows_are_counted(root):
    bad = {
        "not one of entailment, neutral, contradiction": published(1, "entails"),
        "sentence2 is empty": published(2, "neutral", sentence2=" "),
        "sentence2 is missing": published(3, "neutral", sentence2=None),
        "Flickr30K_ID is missing": published(4, "neutral", Flickr30K_ID=None),
        "outside the folder": published(5, "neutral", picture="../x"),
        "not of the file's format (SNLI-VE)": {"sentence2": "x"},
    }
    source = load(root, (published(0, "neutral"), *bad.values()), max_bad_fraction=0.9)
    assert len(source) == 1
    assert [where for where, _ in source.bad_records] == [
        f"{root.path}/data.jsonl:{line}" for line in range(2, 8)
    ]
    for (_, reason), expected in zip(source.bad_records, bad, strict=True):
        assert expected in reason
    with pytest.raises(SourceError, match="6 of 7 records are bad"):
        load(root, (published(0, "neutral"), *bad.values()))


def test_missing_pictures_and_other_layouts(root):
    with pytest.raises(SourceError, match=r"such as .*images/77\.jpg"):
        load(root, (published(0, "neutral", picture="77"),))
    with pytest.raises(SourceError, match=r"no folder .*flickr"):
        load(root, (published(0, "neutral"),), images="flickr")
    with pytest.raises(SourceError, match="use kind 'snli_ve'"):
        load(root, (published(0, "neutral"),), kind="vqa")
