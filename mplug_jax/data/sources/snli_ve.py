"""SNLI-VE: does a Flickr30k picture entail a hypothesis? https://github.com/necla-ml/SNLI-VE"""

from collections.abc import Mapping
from typing import Any

from mplug_jax.data.records import Entailment
from mplug_jax.data.sources.drafts import Draft, choice, needed_integer, text_of

LABELS = ("entailment", "neutral", "contradiction")
# The label of rows whose annotators did not agree.
NO_LABEL = "-"


def read_published(item: Mapping[str, Any]) -> Draft | None:
    """The published rows: `{Flickr30K_ID, pairID, sentence2, gold_label}`.

    A row whose annotators did not agree (gold label "-") is None.
    """
    if item["gold_label"] == NO_LABEL:
        return None
    picture = item["Flickr30K_ID"]
    if isinstance(picture, int):
        picture = str(needed_integer(picture, "Flickr30K_ID"))
    draft = Draft(f"{text_of(picture, 'Flickr30K_ID')}.jpg")
    draft.entailment = _entailment(item.get("sentence2"), "sentence2", item["gold_label"])
    if isinstance(item.get("pairID"), str):
        draft.name = item["pairID"]
    return draft


def read_plain(item: Mapping[str, Any]) -> Draft:
    """mPLUG's rows: `{image, sentence, label}`."""
    draft = Draft(text_of(item.get("image"), "image"))
    draft.entailment = _entailment(item["sentence"], "sentence", item["label"])
    return draft


def _entailment(hypothesis: Any, what: str, label: Any) -> Entailment:
    return Entailment(
        hypothesis=text_of(hypothesis, what), label=choice(label, LABELS, "the label")
    )
