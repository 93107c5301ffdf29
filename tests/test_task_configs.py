"""Configs of the fine-tuning tasks: official hyper-parameters, full-size shapes, and a shrunken
run of each on files in their published layout."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mplug_jax.config import config_errors, model_config
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.models.config import preset
from mplug_jax.models.mplug import count_params, init_params
from mplug_jax.tasks import build_task
from mplug_jax.train import train
from mplug_jax.training.optimizer import policies
from mplug_jax.training.schedules import learning_rate_schedule
from mplug_jax.training.sharding import make_mesh
from mplug_jax.training.state import path_name
from mplug_jax.validation import validate
from tests.published_files import COUNT, write_all
from tests.tasks.evaluators.small import random_params

# The released large model's fusion indeed never updates the image stream.
pytestmark = pytest.mark.filterwarnings("ignore:config.model.fusion")

# (rate, ViT's rate, epochs, warm-up units, warm-up rate, least rate), batch of an update, updates,
# image side: the published recipes, and items of an epoch // batch x epochs by hand.
CAPTION = (1e-5, 5e-6, 5, 4, 1e-5, 1e-6)
SCST = (1e-6, 1e-6, 5, 4, 1e-5, 8e-8)
VQA = (3e-5, 5e-6, 8, 4, 1e-5, 1e-6)
RETRIEVAL = (1e-5, 2e-6, 8, 1, 1e-5, 1e-6)
GROUNDING = (2e-5, 5e-6, 120, 20, 1e-6, 1e-6)
RECIPES: dict[str, tuple[tuple[float, ...], int, int, int]] = {
    "caption_coco:base": (CAPTION, 1024, 5 * 553, 384),
    "caption_coco:large": (CAPTION, 1024, 5 * 553, 336),
    "caption_coco_scst:base": (SCST, 128, 5 * 4427, 384),
    "caption_coco_scst:large": (SCST, 256, 5 * 2213, 336),
    "caption_nocaps:base": (CAPTION, 1024, 5 * 553, 384),
    "caption_nocaps:large": (CAPTION, 1024, 5 * 553, 336),
    "vqa_v2:base": (VQA, 1024, 8 * 2054, 384),
    "vqa_v2:large": (VQA, 2048, 8 * 1027, 336),
    "vqa_v2:base_heldout": (VQA, 1024, 8 * 433, 384),
    "vqa_v2:large_heldout": (VQA, 2048, 8 * 216, 336),
    "vqa_v2:base_test": (VQA, 1024, 8 * 2054, 384),
    "vqa_v2:large_test": (VQA, 2048, 8 * 1027, 336),
    "retrieval_coco:base": (RETRIEVAL, 1024, 8 * 553, 384),
    "retrieval_coco:large": (RETRIEVAL, 1024, 8 * 553, 336),
    "retrieval_flickr30k:base": (RETRIEVAL, 1024, 8 * 141, 384),
    "retrieval_flickr30k:large": (RETRIEVAL, 1024, 8 * 141, 336),
    "grounding_refcoco:refcoco": (GROUNDING, 192, 120 * 628, 336),
    "grounding_refcoco:plus": (GROUNDING, 192, 120 * 625, 336),
    "grounding_refcoco:g": (GROUNDING, 192, 120 * 419, 336),
    "nlvr2:base": ((2e-5, 2e-5, 10, 1, 1e-5, 1e-6), 128, 10 * 674, 384),
    "nlvr2:large": ((2e-5, 2e-5, 10, 1, 1e-5, 1e-6), 128, 10 * 674, 336),
    "snli_ve:base": ((2e-5, 2e-5, 5, 1, 1e-5, 1e-6), 256, 5 * 2068, 384),
    "snli_ve:large": ((2e-5, 2e-5, 5, 1, 1e-5, 1e-6), 256, 5 * 2068, 336),
    "video_retrieval_msrvtt": ((1e-5, 2e-6, 5, 1, 1e-5, 1e-6), 128, 5 * 1406, 224),
    "video_qa_msrvtt": ((3e-5, 5e-6, 5, 4, 1e-5, 1e-6), 128, 5 * 1238, 480),
    "video_qa_msvd": ((3e-5, 5e-6, 5, 4, 1e-5, 1e-6), 128, 5 * 241, 480),
    "video_caption_vatex": ((1e-5, 5e-6, 5, 4, 1e-5, 1e-6), 128, 5 * 2030, 448),
}
# One argument a file; those left out compute the loss of another.
TWINS = ("caption_nocaps", "retrieval_flickr30k", "video_qa_msvd")
FIRST = {name.split(":")[0]: name for name in reversed(RECIPES)}
NAMES = sorted(FIRST[file] for file in FIRST.keys() - set(TWINS))


def load(name: str) -> ConfigDict:
    module, _, arg = name.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    return get_config(arg) if arg else get_config()


@functools.lru_cache
def shapes(model: Any) -> dict:
    return nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))


@pytest.mark.parametrize("name", RECIPES)
def test_config_follows_its_recipe(name):
    config = load(name)
    validate(config)
    recipe, batch, steps, side = RECIPES[name]
    lr, vision_lr, epochs, units, warmup_lr, min_lr = recipe
    optimizer, official = config.optimizer, config.optimizer.official
    assert optimizer.rules[0] == ("^visual_encoder/", {"lr": vision_lr})
    assert (optimizer.lr, official.epochs, official.warmup_units) == (lr, epochs, units)
    assert (optimizer.warmup_lr, optimizer.min_lr) == (warmup_lr, min_lr)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert optimizer.weight_decay == 0.02
    assert (config.batch_size, config.total_steps) == (batch, steps)
    assert tuple(config.model.vision.image_size) == (side, side)
    assert config.accumulate == official.iterations_per_step
    # bf16 and clipping are VQA's alone.
    of_vqa = config.task == "vqa"
    assert (optimizer.clip_norm, config.model.dtype) == (
        (1.0, "bfloat16") if of_vqa else (0.0, "float32")
    )
    assert tuple(config.data.crop_scale) == (0.5, 1.0)


@pytest.mark.parametrize("name", ["caption_coco:base", "vqa_v2:large", "grounding_refcoco:g"])
def test_rate_falls_from_the_recipes_to_the_least_by_epochs(name):
    config = load(name)
    lr, _, epochs, _, _, min_lr = RECIPES[name][0]
    schedule = learning_rate_schedule(config.optimizer.to_dict(), lr, config.total_steps)
    epoch = config.total_steps // epochs
    last = min_lr + (lr - min_lr) * (1 + np.cos(np.pi * (epochs - 1) / epochs)) / 2
    assert float(schedule(config.total_steps - 1)) == pytest.approx(last, rel=1e-5)
    assert float(schedule(config.total_steps - 1 - epoch)) > last


@pytest.mark.parametrize("size", ["base", "large"])
def test_full_size_parameters_are_those_of_the_released_models(size):
    counts = {
        part: count_params(tree) / 1e6
        for part, tree in shapes(model_config(load(f"caption_coco:{size}"), 30522)).items()
    }
    width, projection, released = {"base": (768, 512, 86.5), "large": (1024, 768, 304.3)}[size]
    # The released ViT counts CLIP's unused projection to its own space.
    assert counts["visual_encoder"] + width * projection / 1e6 == pytest.approx(released, abs=0.05)
    assert counts["text_encoder"] == pytest.approx(66.4, abs=0.05)
    assert counts["decoder"] == pytest.approx(137.9, abs=0.05)
    # The released fusion has twelve layers, of which six are dead, and embeddings that nothing
    # reads; a connected layer, the fourth of base, has no use for its cross-attention.
    embeddings = (30522 + 512 + 2 + 2) * 768
    cross_attention = 4 * (768 + 1) * 768 + 2 * 768
    unused = {"base": cross_attention, "large": 0}[size] / 1e6
    running = (137.3 - embeddings / 1e6) / 2 - unused
    assert counts["fusion"] == pytest.approx(running, abs=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_a_released_one_but_for_its_inputs_and_classes(name):
    model = model_config(load(name), 30522)
    base = model.vision.width == 768
    expected = preset("base" if base else "large")
    inputs = {"image_size": expected.vision.image_size}
    assert dataclasses.replace(model.vision, **inputs) == expected.vision
    assert (model.text, model.fusion, model.decoder) == (
        expected.text,
        expected.fusion,
        expected.decoder,
    )
    assert model.embed_dim == expected.embed_dim


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("caption_coco", "huge"),
        ("vqa_v2", "base_minival"),
        ("vqa_v2", "small"),
        ("grounding_refcoco", "refcoco+"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_known_ones(name, arg):
    with pytest.raises(ValueError, match=r"choose|comes _heldout"):
        load(f"{name}:{arg}")


def test_heldout_vqa_never_trains_on_the_pictures_it_is_judged_on():
    config = load("vqa_v2:base_heldout")
    paths = [source["path"] for source in config.data.train]
    assert paths == ["v2_OpenEnded_mscoco_train2014_questions.json"]
    assert config.evals.val.source.path == "v2_OpenEnded_mscoco_val2014_questions.json"


# By the metric of our evaluators, the tables of the paper, large where it is not said.
PUBLISHED: dict[str, dict[str, float]] = {
    "caption_coco:base": {"test/cider": 137.5},
    "caption_coco:large": {"test/cider": 141.0},
    "caption_coco_scst:base": {"test/cider": 150.4},
    "caption_coco_scst:large": {"test/cider": 155.1},
    "caption_nocaps:large": {"nocaps/cider": 114.8},
    "vqa_v2:base_test": {"test/accuracy": 79.79},
    "vqa_v2:large_test": {"test/accuracy": 81.27},
    "retrieval_coco:large": {"test/txt_r1": 82.8, "test/img_r1": 65.8},
    "retrieval_flickr30k:large": {"test/txt_r1": 97.6, "test/img_r1": 88.4},
    "grounding_refcoco:refcoco": {
        "val/acc@0.5": 92.40,
        "testA/acc@0.5": 94.51,
        "testB/acc@0.5": 88.42,
    },
    "grounding_refcoco:plus": {
        "val/acc@0.5": 86.02,
        "testA/acc@0.5": 90.17,
        "testB/acc@0.5": 78.17,
    },
    "grounding_refcoco:g": {"val/acc@0.5": 85.88, "test/acc@0.5": 86.42},
    "nlvr2:large": {"dev/accuracy": 84.58, "test/accuracy": 84.95},
    "snli_ve:large": {"dev/accuracy": 89.45, "test/accuracy": 89.29},
    "video_retrieval_msrvtt": {"test/img_r1": 38.1},
    "video_qa_msrvtt": {"test/accuracy": 21.1},
    "video_qa_msvd": {"test/accuracy": 37.2},
    "video_caption_vatex": {"test/cider": 42.0},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_figures_are_named_after_our_evaluators(name):
    assert dict(load(name).published) == PUBLISHED.get(name, {})


def test_generation_settings_are_the_published_ones():
    caption, vatex = load("caption_coco:base").evals.test, load("video_caption_vatex").evals.test
    assert (caption.beams, caption.min_length, caption.max_length) == (5, 8, 25)
    assert (caption.memory, caption.prompt, caption.procedure) == ("image", "", "standard")
    assert (vatex.beams, vatex.min_length, vatex.max_length) == (10, 15, 25)
    assert (vatex.memory, vatex.prompt) == ("image", "a picture of")
    scst = load("caption_coco_scst:base").finetune.scst
    assert (scst.texts, scst.min_length, scst.max_length) == (5, 8, 25)
    vqa = load("vqa_v2:base").evals.val
    assert (vqa.answers, vqa.beams, vqa.max_length) == ("generate", 5, 10)
    assert load("retrieval_coco:large").evals.test.rerank == 256
    clips = load("video_retrieval_msrvtt")
    assert (clips.model.frames, clips.evals.test.rerank, clips.evals.test.score) == (
        12,
        128,
        "itm+sim",
    )
    assert [load(f"video_{n}").model.frames for n in ("qa_msrvtt", "caption_vatex")] == [16, 8]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_all(folder)
    return folder


def shrunk(name: str, root: Any) -> ConfigDict:
    """The config on the files under ``root`` with a model of width 16, two steps."""
    config = load(name)
    config.data.update({"root": str(root), "workers": 0, "randaugment": False})
    config.data.text_length = min(config.data.text_length, 16)
    config.data.target_length = min(config.data.target_length, 16)
    model = config.model
    # A width of its own keeps the bridge of the large model.
    width = 16 if model.vision.width == model.text.width else 24
    small = {"depth": 1, "heads": 2, "mlp_dim": 16}
    model.vision.update({**small, "width": width, "image_size": (32, 32), "patch_size": (16, 16)})
    model.text.update({**small, "width": 16, "vocab_size": 0, "max_positions": 32})
    model.fusion.update({"depth": 2, "stride": 1 if model.fusion.stride == 3 else 2})
    model.decoder.depth = 1
    model.update({"embed_dim": 8, "frames": min(model.frames, 2), "remat": "none"})
    config.objectives.itc.queue_size = min(config.objectives.itc.queue_size, 16)
    config.finetune.scst.update({"texts": 2, "max_length": 5, "min_length": 1})
    config.finetune.vqa.answers = min(config.finetune.vqa.answers, 2)
    config.update({"total_steps": 2, "batch_size": COUNT, "accumulate": 1, "eval_every": 0})
    config.optimizer.official.update({"epochs": 2, "steps_per_epoch": 1})
    for settings in config.evals.values():
        short = {"max_length": 5, "min_length": 1, "beams": 2, "rerank": 2, "rank": 2}
        settings.update({key: value for key, value in short.items() if key in settings})
    validate(config)
    return config


def first_batch(task: Any, params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
    """A batch as the data pipeline makes it, with what the task adds to it."""
    batch = next(
        train_iterator(task.sources, task.make_example, seed=1, batch_size=COUNT, threads=0)
    )
    rollout = task.rollout(make_mesh({"data": 1}, jax.devices()[:1]))
    if rollout is None:
        return batch
    batch = rollout(params, batch, 0)
    # An untrained model's texts share no word with the references, so that nothing is rewarded.
    return {**batch, "rewards": np.arange(batch["rewards"].size).reshape(-1, 2) % 3 * np.float32(1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_parts_without_a_gradient_are_frozen(name, root, tmp_path):
    config = shrunk(name, root)
    with config_errors():
        task = build_task(config, str(tmp_path))
    params = random_params(task)  # drawn by NumPy: no program for each parameter
    if "temperature" in params:
        params["temperature"] = np.float32(0.07)
    teacher = params if task.uses_momentum else None
    batch = first_batch(task, params, config)
    extra = task.init_extra(jax.random.key(1))

    def loss(params: Any, batch: Any) -> Any:
        return task.loss(params, teacher, extra, batch, jax.random.key(2), np.int32(0))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert np.isfinite(value) and value != 0
    moving = {
        path_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if np.any(leaf)
    }
    trained = {
        path_name(path)
        for path, policy in jax.tree_util.tree_leaves_with_path(
            policies(params, config.optimizer.to_dict())
        )
        if not policy.freeze
    }
    assert moving == trained


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_size_loss_has_the_shapes_of_a_step(name, root, tmp_path):
    config = load(name)
    config.data.update({"root": str(root), "workers": 0})
    task = build_task(config, str(tmp_path))
    example = task.make_example(task.sources[0][0][0], np.random.default_rng(0))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    rollout = task.rollout(mesh)
    example = example if rollout is None else rollout.shapes(example)
    batch = {
        key: jax.ShapeDtypeStruct((2, *value.shape), value.dtype) for key, value in example.items()
    }
    batch["valid"] = jax.ShapeDtypeStruct((2,), bool)
    params = shapes(task.model_config)
    teacher = params if task.uses_momentum else None
    extra = jax.eval_shape(task.init_extra, jax.random.key(1))
    loss, kept, _ = jax.eval_shape(
        task.loss, params, teacher, extra, batch, jax.random.key(2), np.int32(0)
    )
    assert (loss.shape, loss.dtype) == ((), np.float32)
    assert jax.tree.map(lambda x: x.shape, kept) == jax.tree.map(lambda x: x.shape, extra)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vqa_v2:base", "grounding_refcoco:g", "retrieval_flickr30k:large"]
)
def test_a_shrunken_run_trains_and_is_judged(name, root, tmp_path):
    config = shrunk(name, root)
    config.batch_size = jax.device_count()
    results = train(config, str(tmp_path))
    assert {metric.split("/")[0] for metric in results} == set(config.evals)
    assert 0 <= results[config.checkpoint.best_metric] <= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "caption_nocaps:base",
        "nlvr2:base",
        "snli_ve:large",
        "video_retrieval_msrvtt",
        "video_qa_msvd",
        "video_caption_vatex",
    ],
)
def test_an_evaluator_gives_the_metric_that_picks_the_checkpoint(name, root, tmp_path):
    config = shrunk(name, root)
    chosen, metric = config.checkpoint.best_metric.split("/")
    with config.evals.unlocked():
        for other in set(config.evals) - {chosen}:
            del config.evals[other]
    task = build_task(config, str(tmp_path))
    evaluators = task.evaluators(make_mesh({"data": 1}, jax.devices()[:1]))
    params = random_params(task)
    assert 0 <= evaluators[chosen](params, None)[metric] <= 100


@pytest.mark.slow
def test_a_test_set_without_answers_gives_what_the_server_takes(root, tmp_path, caplog):
    config = shrunk("vqa_v2:large_test", root)
    task = build_task(config, str(tmp_path))
    evaluators = task.evaluators(make_mesh({"data": 1}, jax.devices()[:1]))
    assert evaluators["test"](random_params(task), tmp_path) == {}
    assert "holds no answers to compare with" in caplog.text
    lines = json.loads((tmp_path / "answers.json").read_text())
    assert [line["question_id"] for line in lines] == [10, 11]
    assert all(set(line) == {"question_id", "answer"} for line in lines)
