"""A folder with every annotation file that the task configs name, in its published layout, and a
few tiny pictures and clips."""

from __future__ import annotations

import json
import pickle
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT = 4  # pictures, clips, questions ... of a split
SPLITS = ("train", "val", "test")


def write_all(root: Path) -> None:
    """Everything at once; the pictures differ in colour."""
    _vocabulary(root / "vocab.txt")
    _karpathy(root)
    _vqa(root)
    _refer(root)
    _nlvr2(root)
    _entailment(root)
    _nocaps(root)
    _videos(root)


def _vocabulary(path: Path) -> None:
    """BERT's special and unused tokens at their places, then letters and digits."""
    unused = [f"[unused{i}]" for i in range(994)]
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", *unused[:99], *special, *unused[99:], *letters, *(f"##{x}" for x in letters)]
    path.write_text("\n".join(tokens) + "\n")


def _picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.array([37 * number % 256, 90 * number % 256, 200 - 20 * (number % 10)], np.uint8)
    Image.fromarray(np.broadcast_to(colour, (32, 40, 3)).copy()).save(path)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _captions(number: int) -> list[str]:
    return [f"a dog {number} {word}" for word in ("runs", "sits", "eats", "barks", "sleeps")]


def _coco_name(subset: str, number: int) -> str:
    return f"COCO_{subset}_{number:012d}.jpg"


def _karpathy(root: Path) -> None:
    coco, flickr30k = [], []
    for part, split in enumerate(SPLITS):
        subset = "train2014" if split == "train" else "val2014"
        for number in range(part * COUNT + 1, (part + 1) * COUNT + 1):
            sentences = {"sentences": [{"raw": text} for text in _captions(number)], "split": split}
            name = _coco_name(subset, number)
            _picture(root / subset / name, number)
            coco.append({"filepath": subset, "filename": name, "cocoid": number, **sentences})
            _picture(root / "flickr30k-images" / f"{number}.jpg", number)
            flickr30k.append({"filename": f"{number}.jpg", **sentences})
    _json(root / "dataset_coco.json", {"images": coco})
    _json(root / "dataset_flickr30k.json", {"images": flickr30k})


def _vqa(root: Path) -> None:
    for split, first in (("train", 1), ("val", COUNT + 1)):
        numbers = range(first, first + COUNT)
        for number in numbers:
            subset = f"{split}2014"
            _picture(root / subset / _coco_name(subset, number), number)
        questions = [
            {"image_id": n, "question": "what is it", "question_id": 10 * n} for n in numbers
        ]
        said = [{"answer": "dog"}] * 7 + [{"answer": "cat"}] * 3
        annotations = [
            {"question_id": 10 * n, "image_id": n, "answer_type": "other", "answers": said}
            for n in numbers
        ]
        document = {"data_subtype": f"{split}2014", "questions": questions}
        _json(root / f"v2_OpenEnded_mscoco_{split}2014_questions.json", document)
        _json(root / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})
    # Test has questions alone.
    _picture(root / "test2015" / _coco_name("test2015", 1), 1)
    asked = [{"image_id": 1, "question": "what is it", "question_id": 10 + i} for i in range(2)]
    document = {"data_subtype": "test2015", "questions": asked}
    _json(root / "v2_OpenEnded_mscoco_test2015_questions.json", document)
    _picture(root / "visual_genome" / "1.jpg", 1)
    asked = [{"qa_id": i, "question": "what is it", "answer": "A dog."} for i in range(2)]
    _json(root / "question_answers.json", [{"id": 1, "qas": asked}])


def _refer(root: Path) -> None:
    """The pictures are COCO's, which _karpathy has drawn."""
    splits = {"unc": ("train", "val", "testA", "testB"), "umd": ("train", "val", "test")}
    for folder, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        images, annotations, references = [], [], []
        for number in range(1, COUNT + 1):
            name = _coco_name("train2014", number)
            images.append({"id": number, "file_name": name, "width": 40, "height": 32})
            box = [number, 2, 20, 16]
            annotations.append({"id": 70 + number, "image_id": number, "bbox": box})
            references += [
                {
                    "ref_id": 10 * number + place,
                    "ann_id": 70 + number,
                    "image_id": number,
                    "split": split,
                    "sentences": [{"sent_id": 100 * number + place, "sent": "the dog"}],
                }
                for place, split in enumerate(splits[by])
            ]
        _json(root / folder / "instances.json", {"images": images, "annotations": annotations})
        (root / folder / f"refs({by}).p").write_bytes(pickle.dumps(references, protocol=2))


def _nlvr2(root: Path) -> None:
    for split in ("train", "dev", "test1"):
        rows = []
        for number in range(COUNT):
            row = {
                "identifier": f"{split}-{number}-0-0",
                "sentence": "two dogs",
                "label": "True" if number % 2 else "False",
            }
            folder = root / split
            if split == "train":
                row["directory"] = number
                folder = root / "images" / "train" / str(number)
            for side in (0, 1):
                _picture(folder / f"{split}-{number}-0-img{side}.png", number + side)
            rows.append(row)
        _lines(root / f"{split}.json", rows)


def _entailment(root: Path) -> None:
    labels = ("entailment", "neutral", "contradiction", "entailment")
    for split in ("train", "dev", "test"):
        rows = [
            {
                "Flickr30K_ID": str(number + 1),
                "pairID": f"{number}.jpg#0r1e",
                "sentence2": "a dog runs",
                "gold_label": label,
            }
            for number, label in enumerate(labels)
        ]
        _lines(root / f"snli_ve_{split}.jsonl", rows)


def _nocaps(root: Path) -> None:
    images, annotations = [], []
    for number, domain in enumerate(("in-domain", "near-domain", "out-domain", "out-domain")):
        _picture(root / "nocaps" / f"{number}.jpg", number)
        images.append({"id": number, "file_name": f"{number}.jpg", "domain": domain})
        annotations += [{"image_id": number, "caption": text} for text in _captions(number)]
    document = {"images": images, "annotations": annotations}
    _json(root / "nocaps_val_4500_captions.json", document)


def _videos(root: Path) -> None:
    """Clips are folders of frames, which every reader of video files takes in their place."""
    names = [f"video{number}" for number in range(COUNT)]
    for number, name in enumerate(names):
        for frame in range(3):
            _picture(root / "videos" / name / f"{frame}.jpg", number + frame)
    for split in SPLITS:
        _lines(
            root / f"msrvtt_{split}.jsonl",
            [{"clip_name": name, "caption": f"a dog {name}"} for name in names],
        )
        for dataset in ("msrvtt_qa", "msvd_qa"):
            asked = {"question": "what is it", "answer": "dog"}
            rows = [{"video_id": name, **asked} for name in names]
            _lines(root / f"{dataset}_{split}.jsonl", rows)
    for dataset in ("msrvtt_qa", "msvd_qa"):
        _json(root / f"{dataset}_answers.json", ["dog", "cat", "two"])
    for part in ("training_v1.0", "validation_v1.0", "public_test_english_v1.1"):
        rows = [{"videoID": name, "enCap": _captions(i)} for i, name in enumerate(names)]
        _json(root / f"vatex_{part}.json", rows)
