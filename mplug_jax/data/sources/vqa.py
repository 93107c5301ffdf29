"""Questions about pictures: VQA v2, Visual Genome's, and the files that mPLUG makes of both."""

from collections.abc import Iterator, Mapping
from typing import Any

from mplug_jax.data.files import Place
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources.drafts import (
    BadItem,
    Draft,
    asked,
    brief,
    integer,
    is_key,
    is_number,
    list_of,
    mapping_of,
    needed_integer,
    text_of,
)
from mplug_jax.data.sources.json_reading import Item, read_document, read_items

Annotations = Mapping[int | str, Mapping[str, Any]]
SoftLabels = Mapping[str, dict[str, float]]


def read_vqa(item: Mapping[str, Any]) -> Draft:
    """mPLUG's VQA: `{image, question, question_id, answer, ocr, object_label, dataset}`.

    `answer` is the list of the annotators' answers, or a text; an answer's weight is the share of
    annotators who gave it. Rows of a test set have none.
    """
    draft = Draft(text_of(item.get("image"), "image"), integer(item.get("image_id")))
    question = asked(item["question"], item.get("answer", {}), item.get("question_id"))
    if isinstance(item.get("ocr"), list):  # [[position, token], ...]
        question["ocr"] = [str(pair[-1]) for pair in item["ocr"] if isinstance(pair, list) and pair]
    if isinstance(item.get("object_label"), str):
        question["objects"] = item["object_label"]
    draft.questions.append(question)
    return draft


def vqa_v2_items(document: Mapping[str, Any], path: str) -> Iterator[Item]:
    """The rows of a VQA v2 questions file, each with the file's `data_subtype`."""
    common = {"data_subtype": document.get("data_subtype")}
    for index, row in enumerate(document["questions"]):
        where = f"{path}: questions[{index}]"
        yield Item(where, {**common, **row} if isinstance(row, dict) else row)


def read_vqa_v2(
    item: Mapping[str, Any],
    image_name: str | None = None,
    annotations: Annotations | None = None,
) -> Draft:
    """VQA v2: `{image_id, question, question_id}` and its annotation of the other file.

    Args:
      item: the row, with `data_subtype` ("train2014") where known.
      image_name: file name of picture `image_id` as a format; None is the published
        `COCO_<data_subtype>_<image_id, 12 digits>.jpg` (test-dev shares the pictures of test).
      annotations: by question id; None, for the test split, makes questions without answers.
    """
    if not is_key(question_id := item["question_id"]):
        raise BadItem(f"question_id is {brief(question_id)}, not a number or a text")
    image_id = needed_integer(item["image_id"], "image_id")
    if image_name is None:
        if not isinstance(subset := item.get("data_subtype"), str):
            raise BadItem(
                "the names of the pictures are unknown: give the source an `image_name` such as "
                "'COCO_val2014_{image_id:012d}.jpg'"
            )
        image_name = f"COCO_{subset.replace('-dev', '')}_{{image_id:012d}}.jpg"
    draft = Draft(image_name.format(image_id=image_id), image_id, name=str(question_id))
    question = asked(item["question"], {}, question_id)
    if annotations is not None:
        if question_id not in annotations:
            raise BadItem(f"the annotations have no question_id {question_id!r}")
        annotation = annotations[question_id]
        given = list_of(annotation.get("answers"), "answers")
        question["annotators"] = [_annotator(answer) for answer in given]
        question["answers"] = _shares(question["annotators"])
        if isinstance(annotation.get("answer_type"), str):
            question["answer_type"] = annotation["answer_type"]
    draft.questions.append(question)
    return draft


def _annotator(entry: Any) -> str:
    answer = mapping_of(entry, "an entry of answers").get("answer")
    if not isinstance(answer, str):
        raise BadItem(f"an annotator's answer is {brief(answer)}, not a text")
    return answer


def _shares(annotators: list[str]) -> dict[str, float]:
    """The share of all annotators who gave an answer; an annotator's may be empty, not all."""
    given = [answer.strip() for answer in annotators]
    if not any(given):
        raise BadItem("answers holds no answer")
    return {answer: given.count(answer) / len(given) for answer in dict.fromkeys(given) if answer}


def read_annotations(path: Place) -> Annotations:
    """A VQA v2 annotations file by question id.

    Raises:
      SourceError: it is no such file.
    """
    document = read_document(path)
    if not isinstance(document.get("annotations"), list):
        raise SourceError(
            f"{path}: has no list `annotations`, so this is no VQA annotations file; it has: "
            f"{', '.join(map(str, document))}"
        )
    found = {}
    for index, row in enumerate(document["annotations"]):
        question_id = row.get("question_id") if isinstance(row, dict) else None
        if not is_key(question_id):
            raise SourceError(f"{path}: annotations[{index}] has no question_id: {brief(row)}")
        found[question_id] = row
    return found


def visual_genome_parts(item: Item) -> Iterator[Item]:
    """The questions of one picture of Visual Genome's `question_answers.json`."""
    if item.error is not None or not isinstance(item.value, dict):
        yield item
        return
    questions = item.value.get("qas")
    if not isinstance(questions, list):
        yield Item(item.where, error=f"qas is {brief(questions)}, not a list")
        return
    for index, row in enumerate(questions):
        yield Item(f"{item.where} qas[{index}]", {"id": item.value.get("id"), "qas": row})


def read_visual_genome(item: Mapping[str, Any], image_name: str | None = None) -> Draft:
    """Visual Genome: `{id, qas: {question, answer, qa_id}}`, one of a picture's questions.

    Args:
      item: what `visual_genome_parts` makes.
      image_name: file name of picture `image_id` as a format; None is `<image_id>.jpg`.
    """
    row = mapping_of(item["qas"], "an entry of qas")
    image_id = needed_integer(item["id"], "id")
    image = (image_name or "{image_id}.jpg").format(image_id=image_id)
    draft = Draft(image, image_id)
    draft.questions.append(
        asked(row.get("question"), text_of(row.get("answer"), "answer"), row.get("qa_id"))
    )
    if is_key(row.get("qa_id")):
        draft.name = f"vg{row['qa_id']}"
    return draft


def read_soft_labels(path: Place) -> SoftLabels:
    """A file of soft labels `[{question_id, label: {answer: score}}]` by question id as text.

    Raises:
      SourceError: it is no such file.
    """
    items = read_items(path)
    labels = {}
    for item in () if isinstance(items, dict) else items:
        row = item.value
        scores = row.get("label") if isinstance(row, dict) else None
        scored = isinstance(scores, dict) and all(map(is_number, scores.values()))
        if not scored or not is_key(row.get("question_id")):
            reason = item.error or f"is {brief(row)}, not {{question_id, label: {{answer: score}}}}"
            raise SourceError(f"{item.where}: {reason}")
        labels[str(row["question_id"])] = {answer: float(s) for answer, s in scores.items()}
    if not labels:
        raise SourceError(f"{path}: is no list of {{question_id, label: {{answer: score}}}}")
    return labels


def add_soft_labels(draft: Draft, labels: SoftLabels) -> Draft:
    """The draft with `soft_labels` in its questions; raises BadItem for one without."""
    for question in draft.questions:
        question_id = str(question.get("question_id"))
        if question_id not in labels:
            raise BadItem(f"the labels have no question_id {question_id}")
        question["soft_labels"] = labels[question_id]
    return draft
