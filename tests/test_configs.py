"""Every config file: loads, passes the checks, is locked; the big ones at their published sizes."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from ml_collections import ConfigDict

import configs
from configs import photo_tasks, scene_tasks
from mplug_jax.config import ConfigError, defaults, model_config
from mplug_jax.models.mplug import count_params, init_params
from mplug_jax.validation import validate

# The released large model's fusion indeed never updates the image stream.
pytestmark = pytest.mark.filterwarnings("ignore:config.model.fusion")

VOCABULARY = 30522  # BERT's
FILES = sorted(Path(configs.__path__[0]).glob("*.py"))
# The others hold what several experiments share.
NAMES = [path.stem for path in FILES if "def get_config(" in path.read_text()]


def load(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


@functools.lru_cache
def shapes(name: str) -> dict:
    """Parameter shapes at full size; nothing is allocated."""
    model = model_config(load(name), VOCABULARY)
    return nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))


def test_the_files_are_found():
    assert {"quickstart", "scenes", "flickr8k", "pretrain_base", "pretrain_large"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_and_locked_at_every_level(name):
    config = load(name)
    validate(config)
    with pytest.raises(AttributeError):
        config.no_such_key = 1
    for group in (config.model, config.model.text, config.objectives.itc, config.data):
        with pytest.raises(AttributeError):
            group.no_such_key = 1
    with pytest.raises(AttributeError):
        config.evals.no_such_evaluator = {}


@pytest.mark.parametrize(
    ("name", "task"),
    [(name, task) for name in ("quickstart", "scenes") for task in scene_tasks.TASKS]
    + [("photo_tasks", task) for task in photo_tasks.TASKS],
)
def test_every_task_of_the_scenes_and_photographs_is_valid(name, task):
    config = importlib.import_module(f"configs.{name}").get_config(task)
    validate(config)
    assert config.checkpoint.best_metric.split("/")[0] in config.evals
    assert config.objectives.momentum == 0.0


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="'vqq' is unknown; choose one of caption, scst, vqa"):
        importlib.import_module("configs.quickstart").get_config("vqq")


@pytest.mark.parametrize("name", NAMES)
def test_each_call_gives_a_config_of_its_own(name):
    first = load(name)
    first.model.text.width = 7
    assert load(name).model.text.width != 7


@pytest.mark.parametrize("name", NAMES)
def test_model_takes_the_vocabulary_of_bert(name):
    embedding = shapes(name)["text_encoder"]["embeddings"]["word"]["embedding"]
    assert embedding.shape == (VOCABULARY, load(name).model.text.width)


@pytest.mark.parametrize(
    ("name", "millions", "width", "projection", "tokens"),
    # The released models' ViTs: at 384 and 336 px, with CLIP's unused projection to its own space.
    [
        ("pretrain_base", 86.5, 768, 512, 577 - 257),
        ("pretrain_large", 304.3, 1024, 768, 577 - 257),
    ],
)
def test_full_size_parameters_are_those_of_the_released_models(
    name, millions, width, projection, tokens
):
    counts = {part: count_params(tree) / 1e6 for part, tree in shapes(name).items()}
    released = counts["visual_encoder"] + width * (projection + tokens) / 1e6
    assert released == pytest.approx(millions, abs=0.05)
    assert counts["text_encoder"] == pytest.approx(66.4, abs=0.05)
    assert counts["decoder"] == pytest.approx(137.9, abs=0.05)
    assert ("bridge" in counts) == (width != 768)


@pytest.mark.parametrize(
    ("name", "others", "vit", "image", "patch"),
    [("pretrain_base", 1e-4, 1e-5, 256, 16), ("pretrain_large", 5e-5, 5e-6, 224, 14)],
)
def test_pretraining_follows_the_recipe(name, others, vit, image, patch):
    config = load(name)
    optimizer, objectives = config.optimizer, config.objectives
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert optimizer.weight_decay == 0.02
    assert optimizer.lr == others
    assert [rule for rule in optimizer.rules if "lr" in rule[1]] == [
        (r"^visual_encoder/", {"lr": vit})
    ]
    # 20 units of 100 iterations, from the warm-up rate.
    assert (optimizer.warmup_steps, optimizer.warmup_lr) == (2000, 1e-6)
    assert config.total_steps == pytest.approx(30 * 14.9e6 / config.batch_size, rel=1e-3)
    assert objectives.alpha_ramp_steps == pytest.approx(config.total_steps / 30, rel=1e-3)
    assert objectives.momentum == 0.995
    assert {n: objectives[n].alpha for n in ("itc", "mlm", "prefix")} == {
        "itc": 0.4,
        "mlm": 0.4,
        "prefix": 0.4,
    }
    assert {objectives[n].weight for n in ("itc", "itm", "mlm", "prefix")} == {1.0}
    assert objectives.itc.queue_size == 65536
    assert (objectives.mlm.rate, objectives.itm.fraction) == (0.15, 1.0)
    assert tuple(config.model.vision.image_size) == (image, image)
    assert tuple(config.model.vision.patch_size) == (patch, patch)
    assert tuple(config.data.crop_scale) == (0.2, 1.0)
    assert config.data.flip
    assert config.data.randaugment


def test_min_lr_of_base():
    assert load("pretrain_base").optimizer.min_lr == 1e-6


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size=256, .*40000 tokens"):
        model_config(defaults("tiny"), 40000)
