"""Answers to questions about pictures and clips, written freely or chosen from a list."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.items import Items
from mplug_jax.data.records import Source, SourceError
from mplug_jax.data.sources.file_records import under_root
from mplug_jax.data.sources.json_reading import read_items
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.evaluation.vqa import exact_match, soft_label_accuracy, vqa_accuracy
from mplug_jax.generation.beam import BeamConfig
from mplug_jax.generation.ranking import rank_answers
from mplug_jax.tasks.evaluators.held_out import Example, HeldOut, Sheet, best_texts, write_json
from mplug_jax.tasks.forward import text_memory
from mplug_jax.tasks.vqa import question_examples

logger = logging.getLogger(__name__)

Questions = Mapping[int, Mapping[str, Any]]


class VQAEvaluator:
    """Accuracy of answers.

    Args:
      limit: questions asked; 0 takes all.
      answers: 'generate' or 'rank'.
      answer_list: a JSON list of candidates under ``data.root``; '' takes the source's answers.
      rank: candidates that are scored whole.
      beams, max_length, procedure: of the search; 'official' also ranks as the official code does.

    Raises:
      SourceError: the source has no questions, or there are no candidates.
    """

    def __init__(
        self,
        data: HeldOut,
        *,
        limit: int,
        answers: str,
        answer_list: str,
        rank: int,
        beams: int,
        max_length: int,
        procedure: str,
    ):
        self._data = data
        self._items = Items(data.source, "questions", limit)
        self._examples = question_examples(data.setup, data.transform)
        self._candidates: list[str] = []
        if answers == "rank":
            root = data.setup.config.data.root
            listed = _listed_answers(answer_list, root) if answer_list else _answers(data.source)
            self._candidates = listed
            score = "official" if procedure == "official" else "likelihood"
            self._answer = data.compiled(_ranker(data, listed, rank, score))
            return
        search = BeamConfig(beams, max_length, procedure=procedure, returned=1)

        def write(params: Any, batch: Any) -> jax.Array:
            memory = text_memory(data.forward(params), *_inputs(batch))
            return best_texts(data, params, memory, search)

        self._answer = data.compiled(write)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """See ``answer_metrics``."""
        data, sheet = self._data, Sheet()
        answers: dict[int, str] = {}
        questions: dict[int, Any] = {}
        inputs = ("image", "text_ids", "text_mask")
        rows = data.each(self._answer, params, self._examples, inputs, source=self._items)
        for index, example, result in rows:
            answers[index] = self._text(result)
            questions[index] = self._items[index]["questions"][0]
            if samples is not None and sheet.wants(example):
                self._show(sheet, example, questions[index], answers[index])
        if samples is not None:
            # The format of the VQA challenge's result files.
            lines = [
                {"question_id": questions[index].get("question_id", index), "answer": answer}
                for index, answer in answers.items()
            ]
            write_json(samples / "answers.json", lines)
            sheet.write(samples / "vqa.png")
        metrics = answer_metrics(answers, questions, data.setup.tokenizer)
        if not metrics:
            logger.warning("%r holds no answers to compare with: there is no accuracy", data.source)
        return metrics

    def _text(self, result: np.ndarray) -> str:
        if self._candidates:
            return self._candidates[int(result)]
        return self._data.setup.tokenizer.decode(result)

    def _show(self, sheet: Sheet, example: Example, question: Any, answer: str) -> None:
        tokenizer = self._data.setup.tokenizer
        title, right = f"{answer}\n{question['question']}", None
        if question.get("answers"):
            given = {plain(text, tokenizer) for text in question["answers"]}
            right = plain(answer, tokenizer) in given
            title += "" if right else f" (right: {most_frequent(question)})"
        sheet.add(example, title, right)


def answer_metrics(
    answers: Mapping[int, str], questions: Questions, tokenizer: Tokenizer
) -> dict[str, float]:
    """How good answers are, in percent, by what is known of their questions.

    Args:
      answers, questions: by the same ids; the questions as a record holds them.
      tokenizer: texts are compared as it reads them, since it does not give back every writing.

    Returns:
      with the answers of several people the VQA challenge's ``accuracy`` and one for each type of
      answer, such as ``accuracy_yes_no``; with soft labels ``soft_accuracy``; with neither
      ``accuracy``, the answers equal to the most frequent one, and where questions have a type
      one for each, such as ``accuracy_colour``. Questions without any truth are left out.
    """
    people = {i: q["annotators"] for i, q in questions.items() if len(q.get("annotators", ())) > 1}
    labels = {i: q["soft_labels"] for i, q in questions.items() if q.get("soft_labels")}
    truths = {i: most_frequent(q) for i, q in questions.items() if q.get("answers")}
    metrics: dict[str, float] = {}
    if people:
        kinds = {i: questions[i].get("answer_type", "other") for i in people}
        found = vqa_accuracy({i: answers[i] for i in people}, people, kinds)
        metrics |= {name.removeprefix("vqa_"): value for name, value in found.items()}
    if labels:
        plain_labels = {
            i: {plain(text, tokenizer): score for text, score in sorted(soft.items(), key=_score)}
            for i, soft in labels.items()
        }
        said = {i: plain(answers[i], tokenizer) for i in labels}
        metrics |= soft_label_accuracy(said, plain_labels)
    if truths and not people and not labels:
        metrics |= _exact(answers, truths, questions, tokenizer)
    return metrics


def plain(text: str, tokenizer: Tokenizer) -> str:
    """``text`` as the tokenizer gives it back, unless it cannot read all of it."""
    ids = [token for word in tokenizer.words(text) for token in word]
    return text if tokenizer.unk_id in ids else tokenizer.decode(ids)


def _exact(
    answers: Mapping[int, str],
    truths: Mapping[int, str],
    questions: Questions,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """``accuracy`` of all, and of each type of question."""
    groups: dict[str, list[int]] = {"accuracy": list(truths)}
    for index in truths:
        if kind := questions[index].get("type"):
            name = re.sub(r"[^0-9a-z]+", "_", kind.lower())
            groups.setdefault(f"accuracy_{name}", []).append(index)
    said = {i: plain(answers[i], tokenizer) for i in truths}
    right = {i: plain(truth, tokenizer) for i, truth in truths.items()}
    return {
        name: exact_match({i: said[i] for i in group}, {i: right[i] for i in group})["exact_match"]
        for name, group in sorted(groups.items())
    }


def most_frequent(question: Mapping[str, Any]) -> str:
    """The answer that has the largest share of a question's."""
    return max(question["answers"], key=question["answers"].get)


def _score(labelled: tuple[str, float]) -> float:
    return labelled[1]


def _inputs(batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch["image"], batch["text_ids"], batch["text_mask"]


def _ranker(data: HeldOut, candidates: list[str], rank: int, score: str) -> Any:
    """``(params, batch) -> [B]``, the place of the best candidate."""
    setup = data.setup
    encoded = [setup.tokenizer.encode(text, setup.config.data.target_length) for text in candidates]
    ids, mask = (np.stack(part) for part in zip(*encoded, strict=True))
    longest = max(int(mask.sum(axis=1).max()), 3)
    ids, mask = jnp.asarray(ids[:, :longest]), jnp.asarray(mask[:, :longest])
    k = min(rank, len(candidates))

    def choose(params: Any, batch: Any) -> jax.Array:
        memory = text_memory(data.forward(params), *_inputs(batch))
        return rank_answers(setup.model, params, *memory, ids, mask, k=k, score=score)[0][:, 0]

    return choose


def _listed_answers(path: str, root: str | None) -> list[str]:
    """The candidates of a file.

    Raises:
      SourceError: there is no such file, or it is no list of texts.
    """
    file = under_root(path, root, "file")
    found = read_items(file)
    items = [] if isinstance(found, dict) else list(found)
    texts = [item.value for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise SourceError(f'{file}: is no JSON list of answers, such as ["yes", "no", "two"]')
    return list(dict.fromkeys(text.strip() for text in texts))


def _answers(source: Source) -> list[str]:
    """Every answer that the source gives, sorted.

    Raises:
      SourceError: it gives none.
    """
    records = (source[index] for index in range(len(source)))
    asked = (question for record in records for question in record.get("questions") or ())
    found = sorted({answer for question in asked for answer in question.get("answers", ())})
    if not found:
        raise SourceError(
            f"{source!r} holds no answers to rank: name a file of them in the evaluator's "
            "answer_list"
        )
    return found
