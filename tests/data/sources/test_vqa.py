"""VQA v2 as published, Visual Genome's questions, and soft labels."""

import pickle

import pytest

from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

QUESTIONS = {
    "info": {"version": "2.0"},
    "data_type": "mscoco",
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What is it?", "question_id": 9000},
        {"image_id": 581857, "question": "How many dogs?", "question_id": 581857001},
        {"image_id": 9, "question": "Is it red?", "question_id": 9001},
    ],
}
NAMES = ("COCO_train2014_000000000009.jpg", "COCO_train2014_000000581857.jpg")


def annotation(question_id, answers, answer_type="other"):
    return {
        "question_id": question_id,
        "image_id": question_id // 1000,
        "answer_type": answer_type,
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(answers, start=1)
        ],
    }


ANNOTATIONS = {
    "annotations": [
        annotation(9001, ["yes"] * 10, "yes/no"),
        annotation(9000, ["Dog", "puppy", "Dog", "", *["Dog"] * 5, "puppy "]),
        annotation(581857001, ["2"] * 9 + ["3"], "number"),
    ]
}


@pytest.fixture
def root(data_root):
    data_root.add_pictures(*NAMES)
    data_root.write("questions.json", QUESTIONS)
    data_root.write("annotations.json", ANNOTATIONS)
    return data_root


def load(root, path="questions.json", **spec):
    spec = {"kind": "vqa", "path": path, "images": "images", **spec}
    return build_source(spec, root.path)


def questions_of(source):
    return [question for record in source for question in record["questions"]]


def test_questions_with_the_answers_of_the_other_file(root):
    source = load(root, annotations="annotations.json")
    assert [record["id"] for record in source] == ["9000", "581857001", "9001"]
    assert [record["image_id"] for record in source] == [9, 581857, 9]
    assert [record["image"] for record in source] == [
        f"{root.path}/images/{NAMES[i]}" for i in (0, 1, 0)
    ]
    assert questions_of(source) == [
        {
            "question": "What is it?",
            "question_id": 9000,
            "answers": {"Dog": 0.7, "puppy": 0.2},
            "annotators": ["Dog", "puppy", "Dog", "", *["Dog"] * 5, "puppy "],
            "answer_type": "other",
        },
        {
            "question": "How many dogs?",
            "question_id": 581857001,
            "answers": {"2": 0.9, "3": 0.1},
            "annotators": ["2"] * 9 + ["3"],
            "answer_type": "number",
        },
        {
            "question": "Is it red?",
            "question_id": 9001,
            "answers": {"yes": 1.0},
            "annotators": ["yes"] * 10,
            "answer_type": "yes/no",
        },
    ]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_a_test_split_has_questions_alone(root):
    root.add_pictures("COCO_test2015_000000000009.jpg")
    root.write("test.json", {**QUESTIONS, "data_subtype": "test-dev2015"})
    source = load(root, "test.json")
    assert source[0]["image"].endswith("/COCO_test2015_000000000009.jpg")
    assert [question["answers"] for question in questions_of(source)] == [{}, {}, {}]
    assert not any("annotators" in question for question in questions_of(source))


def test_names_of_pictures(root):
    root.add_pictures("000000000009.jpg")
    source = load(root, image_name="{image_id:012d}.jpg")
    assert source[2]["image"] == f"{root.path}/images/000000000009.jpg"
    root.write("bare.json", QUESTIONS["questions"])
    assert len(load(root, "bare.json", image_name="{image_id:012d}.jpg")) == 3
    with pytest.raises(SourceError, match="give the source an `image_name` such as"):
        load(root, "bare.json")
    with pytest.raises(SourceError, match=r"pictures looked for .*images/9\.png"):
        load(root, image_name="{image_id}.png")
    for wrong in ("{image}.jpg", "{}.jpg", "{image_id", "same.jpg", "{image_id:q}", "{image_id.x}"):
        with pytest.raises(ValueError, match="not a format of image_id such as"):
            load(root, image_name=wrong)


def test_bad_questions_are_counted(root):
    bad = [
        {"image_id": "9", "question": "image?", "question_id": 1},
        {"image_id": 9, "question": "unknown?", "question_id": 77},
        {"image_id": 9, "question": "", "question_id": 9000},
        {"image_id": 9, "question": "no answers?", "question_id": 5},
        {"image_id": 9, "question": "all empty?", "question_id": 6},
        {"image_id": 9, "question": "id?", "question_id": [3]},
        "row",
    ]
    document = {**QUESTIONS, "questions": QUESTIONS["questions"] + bad}
    root.write("bad.json", document)
    more = [{"question_id": 5, "answers": "x"}, {"question_id": 6, "answers": [{"answer": " "}]}]
    root.write("more.json", {"annotations": ANNOTATIONS["annotations"] + more})
    source = load(root, "bad.json", annotations="more.json", max_bad_fraction=0.7)
    assert len(source) == 3
    where = [f"{root.path}/bad.json: questions[{i}]" for i in range(3, 10)]
    assert [place for place, _ in source.bad_records] == where
    reasons = (
        "image_id is '9'",
        "no question_id 77",
        "question is empty",
        "answers is 'x'",
        "answers holds no answer",
        "question_id is [3]",
        "not of the file's format (VQA v2)",
    )
    for (_, reason), expected in zip(source.bad_records, reasons, strict=True):
        assert expected in reason
    with pytest.raises(SourceError, match=r"7 of 10 records are bad"):
        load(root, "bad.json", annotations="more.json", max_bad_fraction=0.6)


def test_files_that_do_not_belong_there(root):
    with pytest.raises(SourceError, match="`path` is the file of questions"):
        load(root, "annotations.json")
    with pytest.raises(SourceError, match=r"no list `annotations`.*data_subtype, questions"):
        load(root, annotations="questions.json")
    root.write("no_id.json", {"annotations": [{"answers": []}]})
    with pytest.raises(SourceError, match=r"annotations\[0\] has no question_id"):
        load(root, annotations="no_id.json")
    root.write("list.json", [1])
    with pytest.raises(SourceError, match="holds a list, not a JSON object"):
        load(root, annotations="list.json")
    with pytest.raises(SourceError, match=r"no file .*none\.json"):
        load(root, annotations="none.json")
    with pytest.raises(SourceError, match=r"no folder .*photos"):
        load(root, images="photos")
    with pytest.raises(SourceError, match=r"'VQA v2', which a 'captions' source.*use kind 'vqa'"):
        build_source({"kind": "captions", "path": "questions.json"}, root.path)
    root.write("mplug.json", [{"image": "a.jpg", "question": "what ?", "answer": "x"}])
    with pytest.raises(SourceError, match="'VQA', which has no use for 'annotations'"):
        load(root, "mplug.json", annotations="annotations.json")


GENOME = [
    {
        "id": 9,
        "qas": [
            {"image_id": 9, "qa_id": 21, "question": "What is it?", "answer": "A dog."},
            {"image_id": 9, "qa_id": 22, "question": "Where?", "answer": ""},
        ],
    },
    {"id": 10, "qas": []},
    {"id": 11, "qas": [{"image_id": 11, "qa_id": 23, "question": "Who?", "answer": "Nobody."}]},
    {"id": 12, "qas": "none"},
]


def test_visual_genome(root):
    root.add_pictures("9.jpg", "VG/000011.png")
    root.write("genome.json", GENOME)
    source = load(root, "genome.json", max_bad_fraction=0.5)
    assert [record["id"] for record in source] == ["vg21", "vg23"]
    assert [record["image_id"] for record in source] == [9, 11]
    assert source[0]["image"] == f"{root.path}/images/9.jpg"
    assert questions_of(source) == [
        {"question": "What is it?", "question_id": 21, "answers": {"A dog.": 1.0}},
        {"question": "Who?", "question_id": 23, "answers": {"Nobody.": 1.0}},
    ]
    assert [reason for _, reason in source.bad_records] == [
        "answer is empty",
        "qas is 'none', not a list",
    ]
    assert source.bad_records[0][0].endswith("genome.json:1 qas[1]")
    named = load(root, "genome.json", image_name="VG/{image_id:06d}.png", max_bad_fraction=0.5)
    assert named[1]["image"] == f"{root.path}/images/VG/000011.png"


def test_soft_labels(root):
    labels = [
        {"question_id": 9000, "label": {"dog": 1, "puppy": 0.6}},
        {"question_id": 9001, "label": {}},
        {"question_id": 581857001, "label": {"2": 1}},
    ]
    root.write("labels.json", labels)
    for spec in ({"annotations": "annotations.json"}, {}):
        found = [q["soft_labels"] for q in questions_of(load(root, labels="labels.json", **spec))]
        assert found == [{"dog": 1.0, "puppy": 0.6}, {"2": 1.0}, {}]
    root.write("mplug.json", [{"image": "a.jpg", "question": "what ?", "question_id": "9000"}])
    [question] = questions_of(load(root, "mplug.json", labels="labels.json"))
    assert question["soft_labels"] == {"dog": 1.0, "puppy": 0.6}


def test_soft_labels_that_do_not_fit(root):
    root.write("labels.json", [{"question_id": 9000, "label": {"dog": 1}}])
    with pytest.raises(SourceError, match=r"2 of 3 .*the labels have no question_id 581857001"):
        load(root, labels="labels.json")
    for wrong in ([{"question_id": 9000, "label": "dog"}], [{"label": {"dog": 1}}], [3]):
        root.write("labels.json", wrong)
        with pytest.raises(SourceError, match=r"labels\.json:1: is .*not \{question_id, label"):
            load(root, labels="labels.json")
    for wrong in ([], ANNOTATIONS):
        root.write("labels.json", wrong)
        with pytest.raises(SourceError, match=r"labels\.json: is no list of"):
            load(root, labels="labels.json")
