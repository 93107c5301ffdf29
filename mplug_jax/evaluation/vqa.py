"""Accuracy of answers: the VQA challenge's, exact match, and a look-up of soft labels.

The challenge's figure is that of its `vqaEval.py` (GT-Vision-Lab/VQA; Antol et al., ICCV 2015),
whose normalisation is part of the metric, its oddities included.
"""

import re
from collections.abc import Hashable, Mapping, Sequence

from mplug_jax.evaluation.ids import common_ids

# A word that lost one apostrophe of these gets it back. The gaps (no "he'll", no "we'd") are the
# challenge's.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
    "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've "
    "mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've "
    "y'all'll you'd you'd've you'll you're you've"
)
_REPAIRS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the original

_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"zero": "0"}
_ARTICLES = ("a", "an", "the")
# No apostrophe, no colon: those stay.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes `re.UNICODE`, 32, where `re.sub` takes the number of replacements.
_MOST_PERIODS = 32


def normalize_answer(answer: str) -> str:
    """An answer as the challenge compares it: punctuation, number words, articles, contractions."""
    return strip_articles(strip_punctuation(_trimmed(answer)))


def strip_punctuation(text: str) -> str:
    """The first half of the normalisation (`processPunctuation`).

    A mark that touches a space somewhere in the text, or any in a text with a number like 10,000,
    vanishes; any other becomes a space. A period goes unless a digit follows.
    """
    joined = _THOUSANDS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or touches else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def strip_articles(text: str) -> str:
    """The second half (`processDigitArticle`): lower case, number words to digits, articles out,
    apostrophes back into contractions."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in _ARTICLES)


def question_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Accuracy in 0 .. 1 of one answer given those of several people (ten, in the challenge).

    Against all people but one an answer that n of them gave counts min(n / 3, 1); the result is the
    mean over whom to leave out. Answers are normalised only where people differ, as in the
    original.

    Raises:
      ValueError: fewer than two truths, which could only give 0.
    """
    if len(truths) < 2:
        raise ValueError(
            f"the challenge's accuracy leaves one person's answer out and needs 2 at least, not "
            f"{len(truths)}; use `exact_match` for a single right answer"
        )
    answer, given = _trimmed(answer), [_trimmed(truth) for truth in truths]
    if len(set(given)) > 1:
        answer = normalize_answer(answer)
        given = [normalize_answer(truth) for truth in given]
    matches = [truth == answer for truth in given]
    count = sum(matches)
    return sum(min((count - match) / 3, 1.0) for match in matches) / len(matches)


def vqa_accuracy(
    answers: Mapping[Hashable, str],
    truths: Mapping[Hashable, Sequence[str]],
    answer_types: Mapping[Hashable, str] | None = None,
) -> dict[str, float]:
    """The challenge's accuracy in percent.

    Args:
      answers: the model's answer to each question, by id.
      truths: people's answers to each question, by the same ids.
      answer_types: the kind of answer of each question ("yes/no", "number", "other").

    Returns:
      vqa_accuracy, and with `answer_types` one for each kind, as vqa_accuracy_yes_no.

    Raises:
      ValueError: an answer without a question or the other way round, a question with fewer than
        two truths, or one without a kind.
    """
    scores = {}
    for key in common_ids(answers, truths, "answer"):
        try:
            scores[key] = question_accuracy(answers[key], truths[key])
        except ValueError as error:
            raise ValueError(f"question {key!r}: {error}") from error
    metrics = {"vqa_accuracy": _percent(list(scores.values()))}
    if answer_types is not None:
        untyped = [key for key in scores if key not in answer_types]
        if untyped:
            raise ValueError(f"{len(untyped)} questions have no type, the first is {untyped[0]!r}")
        for kind in sorted({answer_types[key] for key in scores}):
            of_kind = [score for key, score in scores.items() if answer_types[key] == kind]
            metrics[f"vqa_accuracy_{re.sub(r'[^0-9a-z]+', '_', kind.lower())}"] = _percent(of_kind)
    return metrics


def exact_match(
    answers: Mapping[Hashable, str], truths: Mapping[Hashable, str | Sequence[str]]
) -> dict[str, float]:
    """Percentage of answers equal to the truth, or to one of several: `exact_match`.

    Compared as they are, as the official video QA evaluation does; clean them first if need be.

    Raises:
      ValueError: an answer without a question or the other way round.
    """
    ids = common_ids(answers, truths, "answer")
    right = {
        key: [truths[key]] if isinstance(truths[key], str) else list(truths[key]) for key in ids
    }
    return {"exact_match": _percent([float(answers[key] in right[key]) for key in ids])}


def soft_label_accuracy(
    answers: Mapping[Hashable, str], labels: Mapping[Hashable, Mapping[str, float]]
) -> dict[str, float]:
    """Mean label of the answers in percent: `soft_accuracy`.

    The official mPLUG validation (`cal_metric` of `vqa_mplug.py`): an answer scores what the
    question's labels give it (the challenge's accuracy, computed beforehand), or 0.

    Raises:
      ValueError: an answer without a question or the other way round.
    """
    ids = common_ids(answers, labels, "answer")
    return {"soft_accuracy": _percent([float(labels[key].get(answers[key], 0.0)) for key in ids])}


def _trimmed(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)
