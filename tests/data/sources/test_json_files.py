"""Annotation files in every published layout, and broken ones."""

import json
import logging
import pickle

import numpy as np
import pytest

from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources.json_files import json_records

PICTURES = ("a.jpg", "b.jpg", "sub/c.jpg")


@pytest.fixture
def root(data_root):
    """A data root with three pictures of 40 x 20 pixels in `images/`."""
    return data_root.path


def load(root, content, kind="captions", name="data.json", **options):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / name).write_text(text, encoding="utf-8")
    return json_records(name, kind=kind, root=root, **{"images": "images", **options})


def rows(source):
    return [source[i] for i in range(len(source))]


def images_of(root, source):
    return [row["image"].removeprefix(f"{root}/images/") for row in rows(source)]


def test_official_caption_file(root):
    source = load(
        root,
        [
            {
                "filename": "c.jpg",
                "filepath": "sub",
                "sentences": [{"raw": "One ."}, {"raw": " Two "}],
                "object_label": "dog&&cat",
            },
            {"filename": "a.jpg", "sentences": [{"raw": "Three"}]},
        ],
    )
    assert images_of(root, source) == ["sub/c.jpg", "a.jpg"]
    assert [row["captions"] for row in rows(source)] == [["One .", "Two"], ["Three"]]
    assert [row["image_id"] for row in rows(source)] == [0, 1]
    assert source[0]["id"] == "sub/c.jpg"


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": name, "split": split, "cocoid": 500 + i, "sentences": [{"raw": split}]}
        for i, (name, split) in enumerate(
            [("a.jpg", "train"), ("b.jpg", "val"), ("a.jpg", "restval"), ("b.jpg", "test")]
        )
    ],
}


@pytest.mark.parametrize(
    ("split", "captions"),
    [("train", ["train", "restval"]), ("val", ["val"]), ("test", ["test"]), (None, None)],
)
def test_karpathy_splits(root, split, captions):
    source = load(root, KARPATHY, split=split)
    expected = captions or ["train", "val", "restval", "test"]
    assert [row["captions"][0] for row in rows(source)] == expected
    if split == "train":
        assert [row["image_id"] for row in rows(source)] == [500, 502]


def test_a_split_that_is_not_there(root):
    with pytest.raises(SourceError, match="no split 'valid'; it has restval, test, train, val"):
        load(root, KARPATHY, split="valid")
    with pytest.raises(SourceError, match="has no splits"):
        load(root, [{"image": "a.jpg", "caption": "one"}], split="train")


def test_retrieval_train_and_eval_files(root):
    train = load(
        root,
        [
            {"image": "a.jpg", "caption": "one", "image_id": "coco_12"},
            {"image": "b.jpg", "caption": "two", "image_id": "coco_7"},
            {"image": "a.jpg", "caption": "three", "image_id": "coco_12"},
        ],
        kind="retrieval",
    )
    assert [row["captions"] for row in rows(train)] == [["one"], ["two"], ["three"]]
    assert [row["image_id"] for row in rows(train)] == [0, 1, 0]
    assert len({row["id"] for row in rows(train)}) == 3
    evaluation = load(root, [{"image": "b.jpg", "caption": ["x", "y"]}], kind="retrieval")
    assert evaluation[0]["captions"] == ["x", "y"]


def test_integer_image_ids_are_kept_only_if_all_records_have_one(root):
    kept = [{"image": n, "caption": "x", "image_id": 40 + i} for i, n in enumerate(PICTURES)]
    assert [row["image_id"] for row in rows(load(root, kept))] == [40, 41, 42]
    for unusable in (None, True, -1, 2**31, "7"):
        mixed = [*kept, {"image": "a.jpg", "caption": "y", "image_id": unusable}]
        assert [row["image_id"] for row in rows(load(root, mixed))] == [0, 1, 2, 0]


def test_official_vqa_file(root):
    source = load(
        root,
        [
            {
                "dataset": "vqa",
                "image": "a.jpg",
                "question": "what is it ?",
                "question_id": 31,
                "answer": ["cat", "cat", "dog", "cat"],
                "ocr": [[[0, 0], "STOP"], [[1, 1], "4 way"]],
                "object_label": "cat&&sofa",
            },
            {"dataset": "vg", "image": "a.jpg", "question": "where ?", "answer": "on a sofa"},
            {"image": "b.jpg", "question": "test set ?", "question_id": "q7"},
        ],
        kind="vqa",
    )
    first, second, third = (row["questions"] for row in rows(source))
    assert first == [
        {
            "question": "what is it ?",
            "answers": {"cat": 0.75, "dog": 0.25},
            "question_id": 31,
            "ocr": ["STOP", "4 way"],
            "objects": "cat&&sofa",
        }
    ]
    assert second == [{"question": "where ?", "answers": {"on a sofa": 1.0}}]
    assert third == [{"question": "test set ?", "answers": {}, "question_id": "q7"}]
    assert [row["image_id"] for row in rows(source)] == [0, 0, 1]
    assert [row["captions"] for row in rows(source)] == [[], [], []]


def test_grounding_rows(root):
    row = {"image": "a.jpg", "phrase": "a dog", "box": [0.1, 0.2, 1.0004, 0.9], "type": "animals"}
    source = load(root, [row], kind="grounding")
    assert source[0]["phrases"] == [
        {"phrase": "a dog", "box": [0.1, 0.2, 1.0, 0.9], "type": "animals"}
    ]


@pytest.mark.parametrize("box_format", ["xywh", "xyxy"])
def test_transvg_tuples_are_scaled_by_the_picture(root, box_format):
    box = [4, 5, 16, 10] if box_format == "xywh" else [4, 5, 20, 15]
    content = [["a.jpg", "seg.png", box, "the dog", ["r1"]]]
    source = load(root, content, kind="grounding", box_format=box_format)
    phrase = source[0]["phrases"][0]
    assert phrase["phrase"] == "the dog"
    np.testing.assert_allclose(phrase["box"], [4 / 40, 5 / 20, 20 / 40, 15 / 20])


def test_transvg_tuples_of_a_lost_picture_are_bad_samples(root):
    content = [[name, "", [1, 1, 5, 5], "it", []] for name in ("a.jpg", "lost.jpg")]
    source = load(root, content, kind="grounding")
    with pytest.raises(BadSample, match=r"lost\.jpg"):
        source[1]


OWN = [
    {
        "image": "a.jpg",
        "captions": ["a dog", "ein Hund \u2028 im Gr\u00fcnen"],
        "image_id": 12,
        "questions": [{"question": "what ?", "answers": {"dog": 0.9, "cat": 0.1}}],
        "phrases": [{"phrase": "the dog", "box": [0, 0, 0.5, 1]}],
        "licence": "other keys are passed over",
    },
    {
        "image": "b.jpg",
        "image_id": 13,
        "questions": [
            {"question": "who ?", "question_id": 4, "answers": ["me", "me", "you", "me"]},
            {"question": "why ?", "answers": "because"},
        ],
    },
]


def test_own_json_lines(root):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in OWN) + "\n\n"
    source = load(root, text, kind="jsonl", name="data.jsonl")
    first, second = rows(source)
    assert first["captions"] == ["a dog", "ein Hund \u2028 im Gr\u00fcnen"]
    assert first["questions"] == [{"question": "what ?", "answers": {"dog": 0.9, "cat": 0.1}}]
    assert first["phrases"] == [{"phrase": "the dog", "box": [0.0, 0.0, 0.5, 1.0]}]
    assert second["questions"] == [
        {"question": "who ?", "answers": {"me": 0.75, "you": 0.25}, "question_id": 4},
        {"question": "why ?", "answers": {"because": 1.0}},
    ]
    assert [first["image_id"], second["image_id"]] == [12, 13]
    assert "licence" not in first


def test_own_schema_in_an_array_under_any_name_and_one_line_alone(root):
    assert len(load(root, OWN, kind="jsonl", name="data.txt")) == 2
    assert len(load(root, json.dumps(OWN[0]), kind="jsonl")) == 1


def test_a_kind_wants_its_part_of_the_records(root):
    text = "\n".join(map(json.dumps, OWN))
    source = load(root, text, kind="captions", max_bad_fraction=0.5)
    assert len(source) == 1
    assert source.bad_records == [(f"{root}/data.json:2", "has no captions")]
    assert len(load(root, text, kind="vqa")) == 2


def test_a_format_of_another_kind_names_the_right_one(root):
    with pytest.raises(SourceError, match=r"'retrieval'.*use kind 'captions' or 'retrieval'"):
        load(root, [{"image": "a.jpg", "caption": "x"}], kind="vqa")
    with pytest.raises(SourceError, match="use kind 'captions'"):
        load(root, [{"image": "a.jpg", "caption": "x"}], kind="jsonl")
    with pytest.raises(SourceError, match=r"format is none of.*keys image, sentence"):
        load(root, [{"image": "a.jpg", "sentence": "x"}])


BAD_LINES = {
    '{"image": "a.jpg", "captions": ["cut': "no JSON",
    '{"captions": ["no image"]}': "not of the file's format",
    '{"image": "a.jpg", "captions": "a text"}': "captions is 'a text', not a list",
    '{"image": "a.jpg", "captions": []}': "no caption",
    '{"image": "a.jpg", "captions": ["  "]}': "caption 0 is empty",
    '{"image": "a.jpg", "captions": [7]}': "caption 0 is 7, not a text",
    '{"image": 5, "captions": ["x"]}': "image is 5, not a text",
    '{"image": "../secret.jpg", "captions": ["x"]}': "outside the folder",
    '{"image": "/etc/passwd", "captions": ["x"]}': "outside the folder",
    '{"image": "a.jpg", "captions": ["x"], "image_id": "7"}': "image_id is '7'",
    '{"image": "a.jpg", "captions": ["x"], "phrases": [{"phrase": "y", "box": [1, 2]}]}': "box",
    '{"image": "a.jpg", "captions": ["x"], "phrases": [{"phrase": "y", "box": [0, 0, 0, 1]}]}': (
        "box"
    ),
    '{"image": "a.jpg", "captions": ["x"], "phrases": [{"phrase": "y", "box": [0, 0, 9, 9]}]}': (
        "fractions"
    ),
    '{"image": "a.jpg", "captions": ["x"], "questions": [{"question": ""}]}': "question is empty",
    '{"image": "a.jpg", "captions": ["x"], "questions": [{"question": "q", "answers": []}]}': (
        "empty list"
    ),
    '{"image": "a.jpg", "captions": ["x"], "questions": ["q"]}': "not an object",
    "17": "not of the file's format",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_skipped_and_named(root, line, caplog):
    good = '{"image": "a.jpg", "captions": ["good"]}'
    with caplog.at_level(logging.WARNING):
        source = load(root, f"{good}\n{line}\n{good}\n", name="data.jsonl", max_bad_fraction=0.5)
    assert len(source) == 2
    [(where, reason)] = source.bad_records
    assert where == f"{root}/data.jsonl:2"
    assert BAD_LINES[line] in reason
    assert f"{where}: skipped: {reason}" in caplog.messages


def test_one_empty_caption_of_several_is_left_out_and_reported(root):
    content = [{"image": "a.jpg", "caption": ["one", "", "three"]}]
    source = load(root, content, max_bad_fraction=0.5)
    assert source[0]["captions"] == ["one", "three"]
    assert source.bad_records == [(f"{root}/data.json:1", "caption 1 is empty")]


def test_items_of_an_array_have_line_numbers(root):
    text = '[\n {"image": "a.jpg",\n  "caption": "x"},\n\n {"image": "b.jpg", "caption": ""}\n]'
    source = load(root, text, max_bad_fraction=0.5)
    assert source.bad_records == [(f"{root}/data.json:5", "caption 0 is empty")]


def test_too_many_bad_records_stop(root, caplog):
    lines = ['{"image": "a.jpg", "captions": ["good"]}'] * 90 + ["{"] * 30
    with pytest.raises(SourceError, match=r"30 of 120 records are bad.*data\.jsonl:91: no JSON"):
        load(root, "\n".join(lines), name="data.jsonl", max_bad_fraction=0.2)
    assert sum("skipped" in message for message in caplog.messages) == 20
    assert len(load(root, "\n".join(lines), name="data.jsonl", max_bad_fraction=0.25)) == 90


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ("[]", "list is empty"),
        ("<html>\n</html>", "line 1 column 1"),
        ('[{"image": "a.jpg", "caption": "x"},\n {"image": oops}]', "line 2 column 12"),
        ('[{"image": "a.jpg", "caption": "x"},\n {"image": "b.j', "line 2 column"),
        ('[{"image": "a.jpg", "caption": "x"},\n', "was it cut off"),
        ('{"images": [{"filename": "a.jpg"}]}', "neither annotations .* nor sentences"),
        ('{"images": [], "annotations": {}}', "no list"),
        ('{"image": "a.jpg", "captions": [""]}', r"no usable records.*caption 0 is empty"),
    ],
)
def test_files_that_cannot_be_used(root, text, message):
    with pytest.raises(SourceError, match=rf"data\.json.*{message}"):
        load(root, text)


def test_a_file_that_is_no_text(root):
    (root / "data.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SourceError, match="UTF-8"):
        json_records("data.json", root=root)


def test_missing_files_and_folders_name_the_root(root, tmp_path):
    with pytest.raises(SourceError, match=rf"no file {root}/none\.json.*config\.data\.root"):
        json_records("none.json", root=root)
    with pytest.raises(SourceError, match=r"config\.data\.root is '.*/nowhere'"):
        json_records("data.json", root=tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"config\.data\.root is None"):
        json_records("no_such_file.json")
    with pytest.raises(SourceError, match=rf"no folder {root}/photos"):
        load(root, [{"image": "a.jpg", "caption": "x"}], images="photos")
    with pytest.raises(SourceError, match=rf"such as {root}/images/q\.jpg.*`images`"):
        load(root, [{"image": "q.jpg", "caption": "x"}])


def test_images_default_to_the_root_and_then_to_the_files_folder(root):
    row = [{"image": "images/a.jpg", "caption": "x"}]
    assert load(root, row, images=None)[0]["image"] == f"{root}/images/a.jpg"
    assert json_records(root / "data.json")[0]["image"] == f"{root}/images/a.jpg"


def test_paths_may_start_from_the_working_directory(root, monkeypatch):
    load(root, [{"image": "a.jpg", "caption": "x"}])
    monkeypatch.chdir(root / "images")
    for data_root in (None, "."):
        source = json_records("../data.json", root=data_root, images=".")
        assert source[0]["image"] == f"{root}/images/a.jpg"


def test_sources_survive_pickling(root):
    source = load(root, OWN, kind="jsonl")
    assert rows(pickle.loads(pickle.dumps(source))) == rows(source)


def test_options_that_the_format_has_no_use_for_are_refused(root):
    row = [{"image": "a.jpg", "phrase": "a dog", "box": [0, 0, 1, 1]}]
    with pytest.raises(SourceError, match="'grounding', which has no use for 'box_format'"):
        load(root, row, kind="grounding", box_format="xyxy")


def test_unknown_settings_are_refused(root):
    with pytest.raises(ValueError, match="kind"):
        load(root, OWN, kind="caption")
    with pytest.raises(ValueError, match="box_format"):
        load(root, OWN, kind="grounding", box_format="cxcywh")
