"""RefCOCO's pickles and instances."""

import os
import pickle

import numpy as np
import pytest

from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

INSTANCES = {
    "images": [
        {"id": 581857, "file_name": "a.jpg", "width": 40, "height": 20},
        {"id": 7, "file_name": "b.jpg", "width": 80, "height": 40},
    ],
    "annotations": [
        {"id": 100, "image_id": 581857, "bbox": [4, 5, 16, 10], "category_id": 1},
        {"id": 200, "image_id": 7, "bbox": [60.0, 10.0, 20.02, 30.5], "category_id": 1},
    ],
    "categories": [],
}


def reference(ref_id, ann_id, image_id, split, *sentences):
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "split": split,
        "category_id": 1,
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"sent": text, "raw": text.title(), "sent_id": 10 * ref_id + i, "tokens": text.split()}
            for i, text in enumerate(sentences)
        ],
    }


REFERENCES = [
    reference(0, 100, 581857, "train", "the dog", "dog on the left"),
    reference(1, 200, 7, "testA", "caf\xe9 on right"),
    reference(2, 100, 581857, "val", "brown dog"),
]


@pytest.fixture
def root(data_root):
    data_root.write("instances.json", INSTANCES)
    data_root.write("refs.json", REFERENCES)
    return data_root


def load(root, path="refs.json", **spec):
    spec = {"kind": "refer", "path": path, "instances": "instances.json", "images": "images"} | spec
    return build_source(spec, root.path)


def check(root, source):
    assert [record["id"] for record in source] == [
        "ref0/sent0",
        "ref0/sent1",
        "ref1/sent10",
        "ref2/sent20",
    ]
    assert [record["image_id"] for record in source] == [581857, 581857, 7, 581857]
    assert source[0]["image"] == f"{root.path}/images/a.jpg"
    phrases = [phrase for record in source for phrase in record["phrases"]]
    assert [phrase["phrase"] for phrase in phrases] == [
        "the dog",
        "dog on the left",
        "caf\xe9 on right",
        "brown dog",
    ]
    first, last = [0.1, 0.25, 0.5, 0.75], [0.75, 0.25, 1.0, 1.0]
    np.testing.assert_allclose(
        [phrase["box"] for phrase in phrases], [first, first, last, first], rtol=1e-12
    )


def test_json(root):
    check(root, load(root))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(root, protocol):
    (root.path / "refs(unc).p").write_bytes(pickle.dumps(REFERENCES, protocol))
    check(root, load(root, "refs(unc).p"))


def test_a_pickle_of_python_2(root):
    # What Python 2 wrote for [{'split': 'train', 'ann_id': 100, ..., 'sent': 'caf\xe9'}], with its
    # byte strings (S in protocol 0) and long integers (L).
    lines = (
        "(lp0\n(dp1\nS'split'\np2\nS'train'\np3\nsS'ann_id'\nL100L\nsS'image_id'\nI581857\n"
        "sS'ref_id'\nI3\nsS'sentences'\n(lp4\n(dp5\nS'sent'\nS'caf\\xe9'\nsS'sent_id'\nI8\nsasa."
    )
    (root.path / "refs(google).p").write_bytes(lines.encode("ascii"))
    [record] = load(root, "refs(google).p")
    assert record["id"] == "ref3/sent8"
    assert record["phrases"][0]["phrase"] == "caf\xe9"


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_cannot_run_code(root):
    target = root.path / "made"
    harmful = pickle.dumps([*REFERENCES, Command(str(target))])
    (root.path / "refs.p").write_bytes(harmful)
    with pytest.raises(SourceError, match=r"refs\.p: the pickle holds .*mkdir, not plain data"):
        load(root, "refs.p")
    assert not target.exists()
    pickle.loads(harmful)  # it is harmful indeed
    assert target.exists()


def test_splits(root):
    for split, ids in (
        ("train", ["ref0/sent0", "ref0/sent1"]),
        ("val", ["ref2/sent20"]),
        ("testA", ["ref1/sent10"]),
    ):
        assert [record["id"] for record in load(root, split=split)] == ids
    with pytest.raises(SourceError, match="no split 'testB'; it has testA, train, val"):
        load(root, split="testB")


def test_bad_references_are_counted(root):
    document = {**INSTANCES, "annotations": [*INSTANCES["annotations"]]}
    document["annotations"] += [
        {"id": 1, "bbox": [1, 2, 3]},
        {"id": 2, "bbox": [50, 5, 10, 10]},
        {"id": 3, "bbox": [1, 1, 0, 5]},
    ]
    document["images"] = [*INSTANCES["images"], {"id": 8, "file_name": "b.jpg"}]
    root.write("instances.json", document)
    bad = [
        (reference(3, 999, 7, "val", "x"), "ann_id 999 is not in the instances file"),
        (reference(4, 100, 999, "val", "x"), "image_id 999 is not in the instances file"),
        (reference(5, 1, 581857, "val", "x"), "box is [1, 2, 3], not four numbers"),
        (reference(6, 2, 581857, "val", "x"), "has no area within the picture of 40 x 20"),
        (reference(7, 3, 581857, "val", "x"), "has no area"),
        (reference(8, 100, 8, "val", "x"), "size is missing x missing"),
        (reference(9, 100, 581857, "val", ""), "sent is empty"),
        ({**REFERENCES[0], "sentences": "x"}, "sentences is 'x', not a list"),
        ({**REFERENCES[0], "sentences": ["x"]}, "a sentence is 'x', not an object"),
        ({**REFERENCES[0], "ann_id": [1]}, "ann_id [1] is not in the instances file"),
        ("x", "sentences is missing"),
    ]
    rows = [*REFERENCES, *(row for row, _ in bad)]
    (root.path / "refs.p").write_bytes(pickle.dumps(rows))
    source = load(root, "refs.p", max_bad_fraction=0.9)
    assert len(source) == 4
    reasons = [reason for _, reason in source.bad_records]
    # The reference without a known annotation has two sentences.
    assert len(reasons) == len(bad) + 1
    for expected in (reason for _, reason in bad):
        assert any(expected in reason for reason in reasons)
    assert source.bad_records[0][0] == f"{root.path}/refs.p: refs[3] sentences[0]"
    with pytest.raises(SourceError, match="12 of 16 records are bad"):
        load(root, "refs.p", max_bad_fraction=0.7)


def test_files_that_do_not_belong_there(root):
    with pytest.raises(SourceError, match="no list `images`"):
        root.write("other.json", {"annotations": []})
        load(root, instances="other.json")
    with pytest.raises(SourceError, match=r"no file .*none\.json"):
        load(root, instances="none.json")
    with pytest.raises(SourceError, match="no list of references with the keys ann_id"):
        load(root, "instances.json")
    (root.path / "refs.p").write_bytes(pickle.dumps({"refs": 1}))
    with pytest.raises(SourceError, match="no list of references"):
        load(root, "refs.p")
    whole = pickle.dumps(REFERENCES)
    for content in (whole[: len(whole) // 2], b"\xff\xd8 a picture", b""):
        (root.path / "refs.p").write_bytes(content)
        with pytest.raises(SourceError, match=r"refs\.p: is neither a pickle nor JSON, or is dam"):
            load(root, "refs.p")
    with pytest.raises(SourceError, match=r"no folder .*coco"):
        load(root, images="coco")
    moved = {**INSTANCES, "images": [{**i, "file_name": "q.jpg"} for i in INSTANCES["images"]]}
    root.write("instances.json", moved)
    with pytest.raises(SourceError, match=r"such as .*images/q\.jpg"):
        load(root)
    with pytest.raises(ValueError, match="needs 'instances'"):
        build_source({"kind": "refer", "path": "refs.json"}, root.path)
