"""Self-critical training: the texts of its rollout, their rewards, and what the loss does."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from pycocoevalcap.cider.cider import Cider as CocoCider

from mplug_jax.config import ConfigError, config_errors, defaults
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import scenes
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.evaluation.ptb import ptb_tokenize
from mplug_jax.generation.beam import BeamConfig, beam_search
from mplug_jax.generation.greedy import greedy
from mplug_jax.objectives.scst import beam_scores
from mplug_jax.tasks import build_task
from mplug_jax.tasks.scst import Rewards, references
from mplug_jax.train import train
from mplug_jax.training.metrics import read_metrics
from mplug_jax.training.sharding import make_mesh, replicated

ROWS, TEXTS, LENGTH = 8, 3, 6
PROMPT = "a"


def settings(**scst: Any) -> ConfigDict:
    """Self-critical training on 64 scenes, with a model that compiles in seconds."""
    config = defaults("tiny")
    config.update({"task": "scst", "batch_size": ROWS})
    config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64})
    config.model.text.update({"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64, "vocab_size": 0})
    config.model.decoder.depth = 1
    config.model.fusion.update({"depth": 1, "schedule": "asymmetric"})
    config.data.train = ({"kind": "scenes", "level": "easy", "split": "train", "size": 64},)
    config.data.tokenizer.update({"kind": "sentencepiece", "path": "", "vocab_size": 128})
    config.data.update({"crop_scale": None, "flip": False, "randaugment": False})
    config.objectives.momentum = 0.0
    config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
    config.finetune.caption.prompt = PROMPT
    config.finetune.scst.update({"texts": TEXTS, "max_length": LENGTH, **scst})
    return config


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """(settings of config.finetune.scst) -> the task; all share one tokenizer."""
    workdir = str(tmp_path_factory.mktemp("scst"))
    return lambda **scst: build_task(settings(**scst), workdir)


@pytest.fixture(scope="module")
def task(make):
    return make()


@pytest.fixture(scope="module")
def params(task):
    """Parameters that write words of captions, and at times end a text."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        mean = 1.0 if path[-1].key in ("scale", "temperature") else 0.0
        return (mean + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    shapes = nn.meta.unbox(jax.eval_shape(task.init_params, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(fill, shapes)
    tokenizer = task.setup.tokenizer
    bias = np.full(tokenizer.vocab_size, -30.0, np.float32)
    for caption in references(task.sources)[0]:
        bias[[token for word in tokenizer.words(caption) for token in word]] = 0.0
    bias[tokenizer.sep_id] = 1.0
    params["decoder"]["head"]["bias"] = bias
    return params


@pytest.fixture(scope="module")
def batch(task):
    rows = train_iterator(task.sources, task.make_example, seed=1, batch_size=ROWS, threads=0)
    return next(rows)


@pytest.fixture(scope="module")
def roll(make, params, batch):
    """(devices, step, settings) -> the batch after the rollout."""

    @functools.cache
    def rollout(devices: int, **scst: Any) -> Any:
        mesh = make_mesh({"data": -1}, jax.devices()[:devices])
        return make(**scst).rollout(mesh), jax.device_put(params, replicated(mesh))

    def roll(devices: int = 1, step: int = 0, **scst: Any) -> dict[str, np.ndarray]:
        built, placed = rollout(devices, **scst)
        return built(placed, batch, step)

    return roll


@pytest.fixture(scope="module")
def rolled(roll):
    return roll(baseline="greedy", chunks=2)


def decoded(task, ids: np.ndarray) -> str:
    """The words of a text after [CLS] and the prompt."""
    prompt = sum(len(word) for word in task.setup.tokenizer.words(PROMPT))
    return ptb_tokenize(task.setup.tokenizer.decode(ids[1 + prompt :].tolist()))


def test_texts_are_those_of_a_beam_search_over_the_pictures(task, params, batch, rolled):
    model, t = task.setup.model, task.setup.tokenizer
    prompt = [t.cls_id, *(token for word in t.words(PROMPT) for token in word)]
    special = {"cls_id": t.cls_id, "sep_id": t.sep_id, "pad_id": t.pad_id}

    def search(params, image):
        memory = model.apply({"params": params}, image, method="encode_image")
        mask = jnp.ones(memory.shape[:2], bool)
        given = {**special, "prompt_ids": np.array(prompt)}
        beams = beam_search(model, params, memory, mask, BeamConfig(TEXTS, LENGTH), **given)
        return beams, greedy(model, params, memory, mask, max_length=LENGTH, **given)

    found, single = jax.jit(search)(params, batch["image"])
    start = len(prompt)
    assert rolled["text_ids"].shape == (ROWS, TEXTS, start + LENGTH)
    assert (rolled["text_ids"][..., :start] == prompt).all()
    assert rolled["text_mask"][..., :start].all()
    np.testing.assert_array_equal(rolled["text_ids"][..., start:], found.ids)
    np.testing.assert_array_equal(rolled["text_mask"][..., start:], found.mask)
    assert len(np.unique(found.lengths)) > 1
    rewards = Rewards(references(task.sources), t)
    expected = rewards(np.asarray(single)[:, None], batch["image_id"])[:, 0]
    np.testing.assert_array_equal(rolled["greedy_reward"], expected)


def test_rewards_are_cider_by_the_frequencies_of_the_training_captions(task, batch, rolled):
    source = task.sources[0][0]
    gold = {i: [ptb_tokenize(c) for c in source[i]["captions"]] for i in range(len(source))}
    for k in range(TEXTS):
        said = {i: [""] for i in gold}
        for row, image_id in enumerate(batch["image_id"]):
            said[int(image_id)] = [decoded(task, rolled["text_ids"][row, k])]
        _, scores = CocoCider().compute_score(gold, said)
        of_picture = dict(zip(gold, scores, strict=True))
        expected = [of_picture[int(image_id)] for image_id in batch["image_id"]]
        np.testing.assert_allclose(rolled["rewards"][:, k], expected, rtol=1e-5, atol=1e-6)
    assert rolled["rewards"].dtype == np.float32
    assert (rolled["rewards"] > 0).any() and len(np.unique(rolled["rewards"])) > 3


def test_the_shapes_announced_are_those_of_the_batch(make, batch, rolled):
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    example = {name: value[0] for name, value in batch.items()}
    announced = make(baseline="greedy").rollout(mesh).shapes(example)
    assert {k: (v.shape, v.dtype) for k, v in announced.items()} == {
        k: (v.shape[1:], v.dtype) for k, v in rolled.items()
    }
    assert set(announced) - set(make().rollout(mesh).shapes(example)) == {"greedy_reward"}
    for name, value in batch.items():
        assert rolled[name] is value


@pytest.mark.slow
def test_chunks_and_devices_change_nothing(roll, rolled):
    beams = roll(baseline="greedy", chunks=1, devices=2)
    samples = [roll(search="sample", chunks=c, devices=d) for c, d in ((1, 1), (2, 2))]
    for one, other in ((rolled, beams), samples):
        assert set(one) == set(other)
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value)


def test_samples_follow_from_seed_and_step(roll):
    steps = [roll(search="sample", chunks=1, devices=1, step=step) for step in (4, 4, 5)]
    first, again, later = (batch["text_ids"] for batch in steps)
    np.testing.assert_array_equal(first, again)
    assert (first != later).any(axis=-1).mean() > 0.5
    # The texts of a picture are drawn each for itself.
    assert (first[:, 0] != first[:, 1]).any()


def told_batch(task, batch: dict[str, np.ndarray], captions: list[str]) -> dict[str, np.ndarray]:
    """A batch as of a rollout that wrote these captions, rewarded 2 and 0, for every picture."""
    texts = [task.setup.tokenizer.encode(f"{PROMPT} {c}", 12) for c in captions]
    ids, mask = (np.stack([part] * ROWS) for part in map(np.stack, zip(*texts, strict=True)))
    rewards = np.tile(np.float32([2.0, 0.0]), (ROWS, 1))
    return {**batch, "text_ids": ids, "text_mask": mask, "rewards": rewards}


@pytest.mark.slow
def test_the_gradient_makes_the_better_text_likelier(task, params, batch):
    told = told_batch(task, batch, ["small red circle", "large blue square on the left"])
    model = task.setup.model

    def scores(params):
        memory = model.apply({"params": params}, told["image"], method="encode_image")
        both = []
        for k in range(2):
            ids, mask = told["text_ids"][:, k], told["text_mask"][:, k]
            seen = jnp.ones(memory.shape[:2], bool)
            logits = model.apply({"params": params}, ids[:, :-1], memory, seen, method="decode")
            both.append(beam_scores(logits, ids, mask, prompt_length=2).mean())
        return jnp.stack(both)

    def objective(params, batch):
        value, extra, metrics = task.loss(params, None, None, batch, jax.random.key(0), 0)
        assert extra is None
        return value, metrics

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, metrics), grads = step(params, told)
    scores = jax.jit(scores)
    before = scores(params)
    after = scores(jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads))
    assert after[0] > before[0] and after[1] < before[1]
    # Rewards 2 and 0 are 1 above and 1 below the baseline; [CLS], "a" and [SEP] count as tokens.
    tokens = told["text_mask"][0].sum(axis=-1)
    expected = np.mean(-np.asarray(before) / tokens * [1.0, -1.0])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward"], 1.0)
    np.testing.assert_allclose(metrics["length"], np.mean(tokens - 2))

    # Without valid rows, and of texts that do not exist, nothing is learnt or logged.
    missing = told["text_mask"] & (np.arange(12) < 2)
    for nothing in ({"valid": np.zeros(ROWS, bool)}, {"text_mask": missing}):
        (value, metrics), grads = step(params, told | nothing)
        assert value == metrics["reward"] == metrics["length"] == 0
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


class Listed:
    """A source of (image_id, captions); None stands for a record that cannot be used."""

    def __init__(self, *records: tuple[int, list[str]] | None):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._records[index] is None:
            raise BadSample("gone.jpg: no such file")
        image_id, captions = self._records[index]
        return {"id": str(index), "image_id": image_id, "captions": captions}


def test_records_of_a_picture_share_their_captions():
    source = Listed((5, ["A dog."]), None, (6, []), (7, ["Cats, two"]), (5, ["It's a dog!"]))
    gathered = references([(source, 1.0)])
    assert gathered == {5: ["a dog", "it 's a dog"], 7: ["cats two"]}


def test_pictures_of_several_sources_have_the_references_of_their_own_source():
    sources = [(Listed((5, ["a"]), (6, ["b"])), 1.0), (Listed((6, ["c"]), (4, ["d"])), 1.0)]

    def example(record: dict[str, Any], _: np.random.Generator) -> dict[str, Any]:
        return {"image_id": np.int32(record["image_id"]), "said": np.array(record["captions"][0])}

    rows = next(train_iterator(sources, example, seed=1, batch_size=16, threads=0))
    gathered = references(sources)
    found = [gathered[int(image_id)] for image_id in rows["image_id"]]
    assert found == [[said] for said in rows["said"]]
    assert set(rows["said"]) == set("abcd")


def test_missing_references_are_refused():
    for empty in (Listed((5, [])), Scenes("easy", "train", size=2, fields=("phrases",))):
        with pytest.raises(SourceError, match=r"data\.train holds no captions"):
            references([(empty, 1.0)])


def test_captions_of_scenes_are_read_without_drawing(monkeypatch):
    source = Scenes("easy", "train", size=20, fields=("captions",))
    expected = {i: list(map(ptb_tokenize, source[i]["captions"])) for i in range(20)}
    moving = Scenes("easy", "train", size=2, video=True)
    clips = {i: list(map(ptb_tokenize, moving[i]["captions"])) for i in range(2)}
    assert references([(moving, 1.0)]) == clips
    monkeypatch.setattr(scenes, "draw", None)
    assert references([(source, 1.0)]) == expected


@pytest.mark.parametrize(
    ("scst", "message"),
    [
        ({"texts": 1}, "texts=1 teaches nothing with the baseline 'mean'"),
        ({"chunks": 0}, "chunks=0 does not cut"),
        ({"chunks": 3}, "chunks=3 does not cut config.batch_size=8 into parts for 2 devices"),
        ({"max_length": 64}, "take 65 tokens to read do not fit the 64 positions"),
        ({"min_length": 6}, "min_length 6 must be at least 0 and below max_length 6"),
        ({"procedure": "fast"}, "procedure 'fast' is unknown"),
    ],
)
def test_impossible_settings_are_refused(make, scst, message):
    mesh = make_mesh({"data": -1}, jax.devices()[:2])
    with pytest.raises(ConfigError, match=message), config_errors():
        make(**scst).rollout(mesh)


@pytest.mark.slow
def test_a_run_rewards_its_texts_and_continues_with_the_same_bits(tmp_path):
    config = settings(search="sample", chunks=1)
    config.update({"total_steps": 3, "log_every": 1, "eval_every": 0, "checkpoint_every": 2})

    def digest() -> str:
        train(config, str(tmp_path))
        return json.loads((tmp_path / "results.json").read_text())["params_sha256"]

    whole = digest()
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["train/reward"] >= 0 and 1 <= line["train/length"] <= LENGTH

    # As if the run had been cut after its second step: the texts of the third are drawn again.
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert digest() == whole
