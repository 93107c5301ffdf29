"""What a task asks of the rest of its config; tests/test_config.py has the checks of all."""

from __future__ import annotations

from typing import Any

import pytest
from ml_collections import ConfigDict

from mplug_jax.config import (
    ConfigError,
    caption_eval,
    classification_eval,
    defaults,
    grounding_eval,
    vqa_eval,
)
from mplug_jax.tasks import TASKS
from mplug_jax.validation import PRETRAINING, validate

SCENES = {"kind": "scenes", "level": "easy", "split": "val"}
# The tasks' classifiers: model.classes, model.classified.
CLASSIFIERS = {"nlvr2": (2, 2), "snli_ve": (3, 1)}
DOWNSTREAM = [task for task in TASKS if task not in PRETRAINING]


def config_of(task: str, **settings: Any) -> ConfigDict:
    """A valid config of a task, but for ``settings``: values by key, dots as two underscores."""
    config = defaults("tiny")
    config.task = task
    config.data.train = (SCENES,)
    if task in CLASSIFIERS:
        config.model.classes, config.model.classified = CLASSIFIERS[task]
    if task in DOWNSTREAM:
        config.objectives.momentum = 0.0
    for key, value in settings.items():
        *groups, name = key.split("__")
        group = config
        for part in groups:
            group = group[part]
        with group.unlocked():
            group[name] = value
    return config


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_valid_config(task):
    validate(config_of(task))


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"config\.task='captions' is unknown; choose pretrain, "):
        validate(config_of("captions"))


@pytest.mark.parametrize("task", DOWNSTREAM)
def test_a_teacher_without_a_use_is_refused(task):
    with pytest.raises(ConfigError, match=r"has no use for: set objectives\.momentum=0"):
        validate(config_of(task, objectives__momentum=0.995))


def test_vqa_may_have_a_teacher_and_needs_one_to_distil():
    validate(config_of("vqa", objectives__momentum=0.995, finetune__vqa__alpha=0.4))
    with pytest.raises(ConfigError, match=r"or give config.finetune.vqa.alpha a value"):
        validate(config_of("vqa", objectives__momentum=0.995))
    with pytest.raises(ConfigError, match=r"vqa.alpha=0.4 needs the momentum model"):
        validate(config_of("vqa", finetune__vqa__alpha=0.4))


def test_weights_of_objectives_are_the_concern_of_pre_training_alone():
    weights = {f"objectives__{name}__weight": 0.0 for name in ("itc", "itm", "mlm", "prefix")}
    validate(config_of("caption", **weights))
    with pytest.raises(ConfigError, match="one of the weights must be positive"):
        validate(config_of("retrieval", **weights))


@pytest.mark.parametrize(
    ("pool", "accumulate", "rows"), [(3, 1, 16), (1, 1, 16), (6, 2, 8), (10, 1, 16)]
)
def test_a_pool_of_negatives_that_does_not_fit_is_told(pool, accumulate, rows):
    settings = {"batch_size": 16, "accumulate": accumulate, "objectives__itm__pool": pool}
    said = rf"itm\.pool={pool} must be 2 or more and divide the {rows} rows of a micro-batch"
    with pytest.raises(ConfigError, match=said):
        validate(config_of("pretrain", **settings))
    validate(config_of("caption", **settings))


@pytest.mark.parametrize("pool", [0, 2, 8, 16, 128])
def test_a_pool_of_negatives_that_fits(pool):
    validate(config_of("pretrain", batch_size=16, objectives__itm__pool=pool))


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("nlvr2", {"model__classes": 3}, "task 'nlvr2': set classes=2, classified=2"),
        ("nlvr2", {"model__classified": 1}, "task 'nlvr2': set classes=2, classified=2"),
        ("snli_ve", {"model__classes": 0}, "task 'snli_ve': set classes=3, classified=1"),
        ("vqa", {"model__classes": 3}, "task 'vqa': set classes=0."),
        ("grounding", {"model__frames": 8}, "task 'grounding' cannot be used with: set frames=1"),
        ("nlvr2", {"model__frames": 2}, "task 'nlvr2' cannot be used with"),
        ("snli_ve", {"model__frames": 2}, "task 'snli_ve' cannot be used with"),
        ("nlvr2", {"data__cached_variants": 1}, "cached_variants=1 keeps one picture a record"),
        (
            "pretrain",
            {"model__frames": 2, "data__cached_variants": 1},
            "config.data.cached_variants cannot be used with",
        ),
        (
            "caption",
            {"finetune__caption__memory": "text"},
            "memory='text' is unknown; choose image",
        ),
        ("scst", {"finetune__scst__search": "best"}, "search='best' is unknown"),
        ("scst", {"finetune__scst__procedure": "own"}, "procedure='own' is unknown"),
        ("scst", {"finetune__scst__baseline": "zero"}, "baseline='zero' is unknown"),
        ("grounding", {"finetune__grounding__weighting": "x"}, "weighting='x' is unknown"),
        ("scst", {"finetune__scst__min_length": 25}, "min_length=25 must be below max_length=25"),
        (
            "grounding",
            {"data__tokenizer__kind": "sentencepiece"},
            "grounding.appended=False takes the .unused. tokens of BERT's vocabulary",
        ),
    ],
)
def test_what_does_not_fit_the_task_is_refused(task, settings, said):
    with pytest.raises(ConfigError, match=said):
        validate(config_of(task, **settings))


def test_clips_fit_the_other_tasks():
    for task in ("retrieval", "caption", "vqa"):
        validate(config_of(task, model__frames=8))


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("vqa", vqa_eval(SCENES, limit=0, answers="guess"), "answers='guess' is unknown; choose"),
        ("vqa", vqa_eval(SCENES, limit=0, rank=0), "rank must be at least 1"),
        ("vqa", vqa_eval(SCENES, limit=0, beams=0), "beams must be at least 1"),
        ("vqa", vqa_eval(SCENES, limit=0, answer_list="a.json"), "read with answers='rank' alone"),
        ("caption", grounding_eval(SCENES, limit=0), "judges what task grounding trains"),
        ("vqa", classification_eval(SCENES, limit=0), "judges what task nlvr2 or snli_ve trains"),
        ("vqa", caption_eval(SCENES, limit=-1, max_length=9), "limit must be at least 0"),
    ],
)
def test_evaluators_that_cannot_work_are_refused(task, settings, said):
    with pytest.raises(ConfigError, match=rf"config\.evals\.mine\..*{said}"):
        validate(config_of(task, evals__mine=settings))


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("vqa", vqa_eval(SCENES, limit=0, answers="rank", answer_list="a.json")),
        ("grounding", grounding_eval(SCENES, limit=5)),
        ("snli_ve", classification_eval(SCENES, limit=0)),
        ("scst", caption_eval(SCENES, limit=0, max_length=9, beams=3, procedure="official")),
    ],
)
def test_evaluators_that_fit_pass(task, settings):
    validate(config_of(task, evals__mine=settings))


@pytest.mark.parametrize(
    "entry", [("other/cider", 141.0), ("mine/cider", "141"), ("mine/cider",), "mine/cider", 141.0]
)
def test_published_figures_are_of_the_evaluators(entry):
    mine = caption_eval(SCENES, limit=0, max_length=9)
    validate(config_of("caption", evals__mine=mine, published=(("mine/cider", 141.0),)))
    with pytest.raises(ConfigError, match=r"published has .*such as .'mine/cider', 141"):
        validate(config_of("caption", evals__mine=mine, published=(entry,)))


def test_transforms_of_a_source_are_checked_with_the_config():
    spec = {**SCENES, "split": "train", "transforms": {"flip": False, "crop_scale": None}}
    validate(config_of("pretrain", data__train=(SCENES, spec)))
    wrong = (SCENES, {**SCENES, "transforms": {"flips": False}})
    with pytest.raises(ConfigError, match=r"train\[1\]: .* no 'flips'; did you mean 'flip'\?"):
        validate(config_of("pretrain", data__train=wrong))
    with pytest.raises(ConfigError, match=r"train\[0\] has transforms, but .*cached_variants=2"):
        validate(config_of("pretrain", data__train=(spec,), data__cached_variants=2))
