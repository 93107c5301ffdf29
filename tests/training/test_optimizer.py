"""The optimizer against an AdamW in NumPy, the schedule against its formula, and the rules."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug_jax.config import NO_DECAY, OFFICIAL_NO_DECAY, ConfigError
from mplug_jax.models.config import PRESETS
from mplug_jax.models.mplug import init_params
from mplug_jax.training.optimizer import (
    Policy,
    learning_rates,
    make_optimizer,
    policies,
    stop_frozen,
)
from mplug_jax.training.schedules import learning_rate_schedule

CONFIG = {
    "lr": 1e-2,
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "clip_norm": 0.0,
    "warmup_steps": 2,
    "warmup_lr": 1e-4,
    "min_lr": 1e-3,
    "schedule": "cosine",
    "official": {"epochs": 0, "warmup_units": 0, "steps_per_epoch": 0, "iterations_per_step": 1},
    "rules": (),
}
SHAPES = {
    "visual_encoder": {"dense": {"kernel": (3, 4), "bias": (4,)}},
    "head": {"kernel": (4, 2), "bias": (2,)},
}


def is_shape(x):
    return isinstance(x, tuple)


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(np.float32), SHAPES, is_leaf=is_shape
    )


def with_rules(*rules, **changes):
    return CONFIG | {"rules": rules} | changes


def run(config, gradients, total_steps):
    """The parameters after these gradients, by make_optimizer."""
    params = jax.tree.map(jnp.asarray, draw(0))
    optimizer = make_optimizer(params, config, total_steps)
    state = optimizer.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(grads, state, params)
    return params


def rate_at(step, lr, config, total_steps):
    """Warm-up, then half a cosine, written from the definition."""
    start, end = min(config["warmup_lr"], lr), min(config["min_lr"], lr)
    warmup = config["warmup_steps"]
    if step < warmup:
        return start + (lr - start) * step / warmup
    done = min((step - warmup) / (total_steps - warmup), 1.0)
    return end + (lr - end) * (1 + math.cos(math.pi * done)) / 2


def adamw(gradients, config, total_steps, lr_of, decay_of):
    """AdamW (Loshchilov & Hutter 2019) in float64 on {path: array}, after clipping."""
    params = {k: v.astype(np.float64) for k, v in flat(draw(0)).items()}
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for step, grads in enumerate(map(flat, gradients)):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        clip = config["clip_norm"]
        factor = clip / norm if 0 < clip < norm else 1.0
        for name, value in params.items():
            g = grads[name].astype(np.float64) * factor
            first[name] = config["b1"] * first[name] + (1 - config["b1"]) * g
            second[name] = config["b2"] * second[name] + (1 - config["b2"]) * g**2
            m = first[name] / (1 - config["b1"] ** (step + 1))
            v = second[name] / (1 - config["b2"] ** (step + 1))
            direction = m / (np.sqrt(v) + config["eps"]) + decay_of(name) * value
            params[name] = value - rate_at(step, lr_of(name), config, total_steps) * direction
    return params


def flat(tree):
    return {
        "/".join(str(k.key) for k in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_equal_trees(actual, expected):
    actual = flat(actual)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_defaults_hold_where_no_rule_matches():
    found = flat_policies(CONFIG)
    assert set(found.values()) == {Policy(lr=1e-2, weight_decay=0.1, freeze=False)}


def flat_policies(config):
    return {
        "/".join(str(k.key) for k in path): policy
        for path, policy in jax.tree_util.tree_leaves_with_path(policies(draw(0), config))
    }


def test_first_matching_rule_decides_each_setting_by_itself():
    found = flat_policies(
        with_rules(
            (r"bias$", {"weight_decay": 0.0}),
            (r"^visual_encoder/", {"lr": 1e-3, "weight_decay": 0.5}),
            (r"dense", {"lr": 7.0, "freeze": True}),
        )
    )
    assert found == {
        "visual_encoder/dense/kernel": Policy(lr=1e-3, weight_decay=0.5, freeze=True),
        "visual_encoder/dense/bias": Policy(lr=1e-3, weight_decay=0.0, freeze=True),
        "head/kernel": Policy(lr=1e-2, weight_decay=0.1, freeze=False),
        "head/bias": Policy(lr=1e-2, weight_decay=0.0, freeze=False),
    }


def test_an_earlier_rule_can_exempt_from_a_later_one():
    found = flat_policies(with_rules((r"head", {"freeze": False}), (r".", {"freeze": True})))
    assert {name for name, policy in found.items() if not policy.freeze} == {
        "head/kernel",
        "head/bias",
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("bias$", {"decay": 0.0}), r"'bias\$' sets 'decay'; settings are: lr, weight_decay, fr"),
        (("bias(", {"lr": 0.0}), r"'bias\(' is no regular expression"),
        (("vision", {"lr": 0.0}), r"'vision' matches no parameter.*visual_encoder"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(rule, message):
    config = with_rules(("kernel", {"lr": 1.0}), rule)
    with pytest.raises(ConfigError, match=message):
        policies(draw(0), config)
    with pytest.raises(ConfigError, match=message):
        make_optimizer(draw(0), config, 10)


@pytest.mark.parametrize(("warmup", "total"), [(3, 11), (0, 5)])
@pytest.mark.parametrize("lr", [1e-2, 5e-5])
def test_schedule_warms_up_and_decays_by_a_cosine(lr, warmup, total):
    config = CONFIG | {"warmup_steps": warmup}
    schedule = learning_rate_schedule(config, lr, total)
    for step in range(total + 2):
        np.testing.assert_allclose(schedule(step), rate_at(step, lr, config, total), rtol=1e-5)
    if warmup:
        np.testing.assert_allclose(schedule(0), min(1e-4, lr), rtol=1e-5)
    np.testing.assert_allclose(schedule(warmup), lr, rtol=1e-6)
    np.testing.assert_allclose(schedule(total), min(1e-3, lr), rtol=1e-5)


def test_rules_keep_their_rate_under_the_official_schedule():
    """A slow part warms down from the common start and ends at the common end."""
    official = {"epochs": 2, "warmup_units": 1, "steps_per_epoch": 102, "iterations_per_step": 1}
    config = with_rules(
        (r"^visual_encoder", {"lr": 1e-3}),
        schedule="official",
        official=official,
        warmup_lr=5e-3,
        min_lr=5e-4,
        weight_decay=0.0,
    )
    params = jax.tree.map(jnp.ones_like, draw(0))
    optimizer = make_optimizer(params, config, 204)

    def body(state, _):
        # Adam's direction for a gradient of one is one.
        updates, state = optimizer.update(params, state, params)
        moved = updates["head"]["bias"][0], updates["visual_encoder"]["dense"]["bias"][0]
        return state, jnp.stack(moved)

    start = optimizer.init(params)
    _, moved = jax.jit(lambda state: jax.lax.scan(body, state, length=210))(start)
    for column, lr in enumerate((1e-2, 1e-3)):
        half = 5e-4 + (lr - 5e-4) / 2
        want = np.repeat([5e-3, lr, half, 5e-4], [101, 1, 102, 6])
        np.testing.assert_allclose(-moved[:, column], want, rtol=1e-3)


def test_official_decay_spares_biases_and_the_layer_norms_of_bert_alone():
    """Decayed by its list: CLIP's norms and embeddings, the bridge's norm, the temperature."""
    preset = PRESETS["tiny"].replace(text={"norm": "post", "width": 48})
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(preset, jax.random.key(0))))
    decayed = {}
    for rule in (NO_DECAY, OFFICIAL_NO_DECAY):
        config = with_rules(rule, (r"^visual_encoder/", {"lr": 5e-3}))
        found = flat(jax.tree.map(lambda policy: policy.weight_decay > 0, policies(shapes, config)))
        decayed[rule[0]] = {name for name, decays in found.items() if decays}
        assert not any(name.endswith("bias") for name in decayed[rule[0]])
    vectors = decayed[OFFICIAL_NO_DECAY[0]] - decayed[NO_DECAY[0]]
    assert vectors == {
        "bridge/layer_norm/scale",
        "temperature",
        "visual_encoder/class_embedding",
        "visual_encoder/position_embedding",
        *(f"visual_encoder/{norm}/scale" for norm in ("ln_pre", "ln_post")),
        *(f"visual_encoder/blocks/{norm}/scale" for norm in ("ln_1", "ln_2")),
    }
    assert decayed[NO_DECAY[0]] < decayed[OFFICIAL_NO_DECAY[0]]
    rates = flat(jax.tree.map(lambda policy: policy.lr, policies(shapes, config)))
    assert {name.split("/")[0] for name, rate in rates.items() if rate == 5e-3} == {
        "visual_encoder"  # the bridge trains at the common rate, as in the official code
    }


@pytest.mark.parametrize("total", [1, 4])
def test_a_run_shorter_than_the_warm_up_still_reaches_the_rate(total):
    schedule = learning_rate_schedule(CONFIG | {"warmup_steps": 50}, 1e-2, total)
    np.testing.assert_allclose(schedule(total - 1), 1e-2, rtol=1e-6)


def test_logged_rate_is_the_default_one():
    config = with_rules((r"head", {"lr": 5.0}))
    logged = learning_rates(config, 10, jnp.asarray(5))
    assert logged["learning_rate"].dtype == jnp.float32
    np.testing.assert_allclose(logged["learning_rate"], rate_at(5, 1e-2, config, 10), rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 3.0])
def test_steps_equal_adamw_with_decay_and_rates_by_parameter(clip_norm):
    config = with_rules(
        (r"bias$", {"weight_decay": 0.0}),
        (r"^head", {"weight_decay": 0.3}),
        (r"^visual_encoder", {"lr": 2e-3}),
        clip_norm=clip_norm,
    )
    # Norms on both sides of clip_norm: about sqrt(26) * scale.
    gradients = [draw(seed, scale) for seed, scale in ((1, 4.0), (2, 0.1), (3, 1.0), (4, 9.0))]
    expected = adamw(
        gradients,
        config,
        total_steps=6,
        lr_of=lambda name: 2e-3 if name.startswith("visual") else 1e-2,
        decay_of=lambda name: (
            0.0 if name.endswith("bias") else 0.3 if name.startswith("head") else 0.1
        ),
    )
    assert_equal_trees(run(config, gradients, total_steps=6), expected)


def test_frozen_leaves_stay_and_others_train_as_without_them():
    rules = ((r"bias$", {"weight_decay": 0.0}), (r"^head", {"lr": 2e-3}))
    gradients = [draw(1), draw(2), draw(3)]
    free = run(with_rules(*rules), gradients, 6)
    frozen = run(with_rules(*rules, (r"^visual", {"freeze": True})), gradients, 6)
    jax.tree.map(np.testing.assert_array_equal, frozen["visual_encoder"], draw(0)["visual_encoder"])
    assert_equal_trees(frozen["head"], flat(free["head"]))
    kernel = "visual_encoder/dense/kernel"
    assert not np.allclose(flat(free)[kernel], flat(draw(0))[kernel])


def test_frozen_leaves_keep_no_moments():
    params = draw(0)
    config = with_rules((r"kernel$", {"freeze": True}))
    shapes = [
        leaf.shape for leaf in jax.tree.leaves(make_optimizer(params, config, 6).init(params))
    ]
    assert (3, 4) not in shapes and (4, 2) not in shapes
    assert shapes.count((4,)) == shapes.count((2,)) == 2


def test_stop_frozen_gives_zero_gradient_to_frozen_leaves_alone():
    config = with_rules((r"^visual_encoder", {"freeze": True}))

    def objective(params):
        params = stop_frozen(params, config)
        x = params["visual_encoder"]["dense"]["kernel"] + params["visual_encoder"]["dense"]["bias"]
        return (x @ params["head"]["kernel"] + params["head"]["bias"]).sum()

    params = draw(0)
    grads = jax.jit(jax.grad(objective))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["visual_encoder"]))
    np.testing.assert_array_equal(grads["head"]["bias"], [3.0, 3.0])
    dense = params["visual_encoder"]["dense"]
    column = (dense["kernel"] + dense["bias"]).sum(axis=0)
    np.testing.assert_allclose(
        grads["head"]["kernel"], np.stack([column, column], axis=1), rtol=1e-5
    )
