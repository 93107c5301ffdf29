"""The constant schedule against its formula, the official one against the loop it comes from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.config import ConfigError
from mplug_jax.training.schedules import learning_rate_schedule, official_lr

CONFIG = {
    "warmup_steps": 2,
    "warmup_lr": 1e-4,
    "min_lr": 1e-3,
    "schedule": "cosine",
    "official": {"epochs": 0, "warmup_units": 0, "steps_per_epoch": 0, "iterations_per_step": 1},
}


@pytest.mark.parametrize("warmup", [3, 0])
def test_a_constant_rate_is_warmed_up_alone(warmup):
    config = CONFIG | {"schedule": "constant", "warmup_steps": warmup}
    for lr in (1e-2, 5e-5):
        schedule = learning_rate_schedule(config, lr, 8)
        start = min(1e-4, lr)
        want = [start + (lr - start) * step / warmup for step in range(warmup)] + [lr] * 6
        np.testing.assert_allclose([schedule(step) for step in range(warmup + 6)], want, rtol=1e-5)


def official_loop(lr, official, warmup_lr, min_lr):
    """Rates of all updates, by the official training loop with timm's scheduler written out."""
    units = official["warmup_units"]
    rate, rates = (warmup_lr if units else lr), []

    def step(index):
        nonlocal rate
        if index < units:
            rate = warmup_lr + index * (lr - warmup_lr) / units
        elif index - units < official["epochs"]:
            turn = math.pi * (index - units) / official["epochs"]
            rate = min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(turn))
        else:
            rate = min_lr

    each = official["iterations_per_step"]
    for epoch in range(official["epochs"]):
        if epoch > 0:
            step(epoch + units)
        for i in range(official["steps_per_epoch"] * each):
            if (i + 1) % each == 0:
                rates.append(rate)
            if epoch == 0 and i % 100 == 0 and i <= units * 100:
                step(i // 100)
    return rates


@pytest.mark.parametrize(
    ("steps_per_epoch", "units", "each"),
    [(450, 3, 1), (150, 3, 1), (120, 4, 4), (60, 2, 3), (5, 0, 1)],
    ids=["warm-up ends in epoch 0", "it does not", "accumulated", "uneven", "none"],
)
@pytest.mark.parametrize("lr", [3e-5, 5e-6, 1e-6])
def test_official_schedule_follows_the_official_loop(lr, steps_per_epoch, units, each):
    official = {
        "epochs": 3,
        "warmup_units": units,
        "steps_per_epoch": steps_per_epoch,
        "iterations_per_step": each,
    }
    config = CONFIG | {
        "schedule": "official",
        "official": official,
        "warmup_lr": 1e-5,
        "min_lr": 2e-6,
    }
    want = official_loop(lr, official, 1e-5, 2e-6)
    schedule = jax.jit(learning_rate_schedule(config, lr, 10**6))
    got = schedule(jnp.arange(len(want) + 5))
    np.testing.assert_allclose(got[:-5], want, rtol=1e-6)
    np.testing.assert_allclose(got[-5:], 2e-6, rtol=1e-6)
    derived = config | {"official": official | {"steps_per_epoch": 0}}
    schedule = jax.jit(learning_rate_schedule(derived, lr, len(want)))
    np.testing.assert_array_equal(schedule(jnp.arange(len(want))), got[:-5])


# The released grounding and retrieval recipes; rates of a PyTorch run of the official scheduler.
@pytest.mark.parametrize(
    ("index", "lr", "recipe", "want"),
    [
        (-1, 1e-5, (8, 1, 1e-5, 1e-6), 1e-5),
        (-1, 3e-5, (8, 0, 1e-5, 1e-6), 3e-5),  # (by hand: no warm-up)
        (1, 2e-6, (8, 1, 1e-5, 1e-6), 2e-6),
        (3, 1e-5, (8, 1, 1e-5, 1e-6), 8.681980515339464e-06),
        (8, 2e-6, (8, 1, 1e-5, 1e-6), 1.0380602337443566e-06),
        (9, 2e-6, (8, 1, 1e-5, 1e-6), 1e-6),
        (12, 2e-5, (120, 20, 1e-6, 1e-6), 1.24e-05),
        (71, 5e-6, (120, 20, 1e-6, 1e-6), 3.4668907277118115e-06),
        (139, 2e-5, (120, 20, 1e-6, 1e-6), 1.003255412732206e-06),
        (141, 2e-5, (120, 20, 1e-6, 1e-6), 1e-6),
    ],
)
def test_official_rates(index, lr, recipe, want):
    names = ("epochs", "warmup_units", "warmup_lr", "min_lr")
    got = official_lr(index, lr, **dict(zip(names, recipe, strict=True)))
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "linear"}, "schedule='linear' is unknown; choose cosine, constant"),
        ({"schedule": "official"}, "optimizer.official.epochs"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        learning_rate_schedule(CONFIG | changes, 1e-2, 10)
