"""A tokenizer that knows the words of all tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mplug_jax.data.sources.scenes import FIELDS, Scenes
from mplug_jax.data.tokenizers import SentencePieceTokenizer, train_sentencepiece


def _texts() -> Iterator[str]:
    for record in Scenes("full", "train", 64, fields=FIELDS[:-1]):
        yield from record["captions"]
        yield from (phrase["phrase"] for phrase in record["phrases"])
        yield record["pair"]["sentence"]
        yield record["entailment"]["hypothesis"]
        for question in record["questions"]:
            yield question["question"]
            yield from question["answers"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    train_sentencepiece(_texts(), path, 128)
    return SentencePieceTokenizer(path)
