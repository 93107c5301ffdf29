"""Each fine-tuning loss on a batch of scenes: what it is made of, and what must not change it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.tasks import build_task
from mplug_jax.tasks.classification import class_examples, class_logits
from mplug_jax.tasks.forward import Forward, picture_memory, text_memory

TASKS = ("caption", "vqa", "grounding", "nlvr2", "snli_ve", "video_qa", "video_caption")


def shrunken(task):
    config = quickstart.get_config(task)
    config.model.vision.update({"width": 24, "depth": 1, "heads": 2, "mlp_dim": 24})
    config.model.text.update({"width": 24, "depth": 1, "heads": 2, "mlp_dim": 24})
    config.model.decoder.depth = 1
    config.data.train = ({**config.data.train[0], "size": 6},)
    texts = {"kind": "scenes", "level": "easy", "split": "train", "size": 20}
    config.data.tokenizer.update({"vocab_size": 64, "texts": (texts,)})
    config.finetune.vqa.answers = 2
    return config


def batch_of(task, rows=4):
    source = task.sources[0][0]
    examples = [task.make_example(source[i], np.random.default_rng(i)) for i in range(rows)]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"valid": np.ones(rows, bool)}


def value(task, params, batch):
    loss = jax.jit(
        lambda p, b: task.loss(p, None, None, b, jax.random.key(1), jnp.int32(0))[0],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return lambda b=batch: float(loss(params, b))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """task name -> (task, parameters, batch), made once."""
    made = {}

    def build(name):
        if name not in made:
            task = build_task(shrunken(name), str(tmp_path_factory.mktemp(name)))
            params = nn.meta.unbox(task.init_params(jax.random.key(0, impl="rbg")))
            made[name] = task, params, batch_of(task)
        return made[name]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_row_that_is_not_valid_changes_nothing(built, name):
    task, params, batch = built(name)
    loss = value(task, params, batch)
    masked = {**batch, "valid": np.array([True, True, False, True])}
    noise = np.random.default_rng(0).integers(0, 256, batch["image"][2].shape, np.uint8)
    replaced = {**masked, "image": batch["image"].copy()}
    replaced["image"][2] = noise
    for field in ("caption_ids", "text_ids", "answer_ids"):
        if field in batch:
            replaced[field] = batch[field].copy()
            replaced[field][2] = 7
    if "label" in batch:
        replaced["label"] = np.where(np.arange(4) == 2, 1 - batch["label"] % 2, batch["label"])
    if "box" in batch:
        replaced["box"] = batch["box"].copy()
        replaced["box"][2] = 0.1
    assert np.isfinite(loss(masked))
    assert loss(replaced) == pytest.approx(loss(masked), rel=1e-6)
    assert loss(batch) != pytest.approx(loss(masked), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_reaches_every_part_that_the_task_reads(built, name):
    task, params, batch = built(name)

    def loss(p):
        return task.loss(p, None, None, batch, jax.random.key(1), jnp.int32(0))[0]

    grads = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(params)
    norms = {
        part: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(g)) for part, g in grads.items()
    }
    writes = name not in ("nlvr2", "snli_ve")
    assert norms["visual_encoder"] > 0
    assert norms["fusion"] > 0
    assert (norms["decoder"] > 0) == writes
    assert (norms.get("classifier", 0) > 0) == (not writes)
    assert norms["itm_head"] == norms["vision_proj"] == 0


@pytest.mark.slow
def test_memories_hold_the_picture_and_the_text(built):
    task, params, batch = built("vqa")
    forward = Forward(task.setup.model, params)
    ids, mask = batch["text_ids"], batch["text_mask"]

    def shapes(function):
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(function, batch["image"]))

    width, patches, length = 24, 1 + 16, ids.shape[1]
    assert shapes(lambda x: text_memory(forward, x, ids, mask)) == (
        (4, patches + length, width),
        (4, patches + length),
    )
    assert shapes(lambda x: picture_memory(forward, x, "image", 2, 3))[0] == (4, patches, width)
    assert shapes(lambda x: picture_memory(forward, x, "fused", 2, 3))[0] == (4, patches + 2, width)
    with pytest.raises(ValueError, match="'text' is unknown; choose image or fused"):
        picture_memory(forward, batch["image"], "text", 2, 3)


@pytest.mark.slow
def test_nlvr2_fuses_the_sentence_with_each_picture_by_itself(built):
    task, params, batch = built("nlvr2")
    forward = Forward(task.setup.model, params)
    logits = class_logits(forward, batch)

    def first_token(side):
        embeds = forward("encode_image", batch["image"][:, side])
        texts = forward("encode_text", batch["text_ids"], batch["text_mask"])
        return forward("fuse", embeds, texts, batch["text_mask"])[1]

    pairs = jnp.stack([first_token(0), first_token(1)], axis=1)
    flat = pairs.reshape(-1, *pairs.shape[2:])
    np.testing.assert_allclose(logits, forward("classify", flat), atol=1e-4)
    mirrored = class_logits(forward, {**batch, "image": batch["image"][:, ::-1]})
    assert not np.allclose(logits, mirrored, atol=1e-3)


def test_evaluation_reads_classes_as_training_does(built):
    task, _, _ = built("snli_ve")
    record = task.sources[0][0][0]
    still = ImageTransform(task.setup.image_size, train=False)
    example = class_examples(task.setup, still)(record, None)
    labels = ("entailment", "neutral", "contradiction")
    assert labels[example["label"]] == record["entailment"]["label"]
    assert example["image"].shape == (32, 32, 3)
