"""Row for row: learning-rate traces, text cleaning, answer normalisation, names of checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from mplug_jax.conversion.official import fine_tuning_name
from mplug_jax.data.cleaning import pre_caption, pre_question
from mplug_jax.evaluation.vqa import strip_articles, strip_punctuation
from mplug_jax.training.schedules import official_lr
from tests.parity.cases import Case, folders

# Rates of all but the ViT and of the ViT, epochs, warm-up units, warm-up rate, least rate.
RECIPES = {
    "lr_caption": (1e-5, 5e-6, 5, 4, 1e-5, 1e-6),
    "lr_vqa": (3e-5, 5e-6, 8, 4, 1e-5, 1e-6),
    "lr_retrieval": (1e-5, 2e-6, 8, 1, 1e-5, 1e-6),
    "lr_grounding": (2e-5, 5e-6, 120, 20, 1e-6, 1e-6),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = [Case(f) for f in folders(metafunc.config.getoption("--goldens"))]
    cases = [case for case in found if case.kind == "misc"]
    metafunc.parametrize("rows", [c.settings for c in cases], ids=[c.name for c in cases])


def test_every_kind_of_row_is_compared(rows):
    known = {*RECIPES, "pre_caption", "pre_question", "vqa_norm", "ckpt_key_map"}
    assert rows.keys() <= known


def test_learning_rates(rows):
    for name, (*rates, epochs, units, warmup_lr, min_lr) in RECIPES.items():
        limits = {"epochs": epochs, "warmup_units": units}
        limits |= {"warmup_lr": warmup_lr, "min_lr": min_lr}
        ours = [[i, *(official_lr(i, lr, **limits) for lr in rates)] for i, *_ in rows[name]]
        np.testing.assert_allclose(ours, rows[name], rtol=1e-12, err_msg=name)


def test_cleaned_texts(rows):
    for name, clean in (("pre_caption", pre_caption), ("pre_question", pre_question)):
        for text, words, cleaned in rows[name]:
            assert clean(text, words) == cleaned, (name, text, words)


def test_normalised_answers(rows):
    for answer, without_marks, normalised in rows["vqa_norm"]:
        assert strip_punctuation(answer) == without_marks
        assert strip_articles(without_marks) == normalised


def test_names_of_checkpoints(rows):
    for old, new in rows["ckpt_key_map"]:
        assert fine_tuning_name(old) == new
