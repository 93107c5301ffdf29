"""Steps that are no number: which are left out, and what ends a run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug_jax.training.finite import FiniteCheck, NonFiniteError
from mplug_jax.training.state import create_state
from mplug_jax.training.step import make_train_step

OPTIMIZER = {
    "lr": 1.0,
    "warmup_steps": 0,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "rules": (),
}
GOOD = {"loss": np.float32(1), "loss_itm": np.float32(1), "grad_norm": np.float32(2)}
BAD_LOSS = GOOD | {"loss": np.float32(np.nan), "loss_itm": np.float32(np.nan)}
BAD_GRADIENT = GOOD | {"grad_norm": np.float32(np.inf)}


SEEN: list[tuple[int, float]] = []


def finite_check(max_skipped: int) -> FiniteCheck:
    SEEN.clear()
    return FiniteCheck(max_skipped, "my run", lambda step, v, ids: SEEN.append((step, v["loss"])))


def follow(check: FiniteCheck, *steps: dict[str, np.float32]) -> None:
    for number, metrics in enumerate(steps, start=1):
        check.follow(number, metrics, np.array([number, 10 * number]))
    check.settle()


@pytest.mark.parametrize(
    ("metrics", "term"), [(BAD_LOSS, "loss=nan, loss_itm=nan"), (BAD_GRADIENT, "grad_norm=inf")]
)
@pytest.mark.parametrize("limit", [0, 1])
def test_the_first_ends_the_run_unless_more_are_allowed(metrics, term, limit):
    with pytest.raises(NonFiniteError) as error:
        follow(finite_check(limit), GOOD, metrics)
    assert str(error.value).startswith(f"step 2: {term}. ")
    command = "python -m mplug_jax.replay --config='my run/config.json' --workdir='my run' --step=2"
    assert f" {command}\n" in str(error.value)
    assert str(error.value).endswith("records: 2, 20.")
    assert SEEN == [(1, 1.0)]


def test_a_step_is_looked_at_when_the_next_has_started_or_sooner_if_asked():
    check = finite_check(0)
    check.follow(1, GOOD, [1])
    check.follow(2, BAD_LOSS, [2])
    with pytest.raises(NonFiniteError, match="step 2"):
        check.follow(3, GOOD, [3])
    check.settle()  # told once


def test_only_so_many_in_a_row_end_the_run():
    check = finite_check(3)
    follow(check, BAD_LOSS, BAD_GRADIENT, GOOD, BAD_LOSS, BAD_LOSS, GOOD)
    assert check.skipped == 4
    with pytest.raises(
        NonFiniteError, match=r"step 3: grad_norm=inf\. It is the last of 3 skipped"
    ):
        follow(check, BAD_LOSS, BAD_LOSS, BAD_GRADIENT)
    assert check.skipped == 7


def loss(params, momentum_params, extra, batch, rng, step):
    """No number where ``batch`` is 1; where it is 2, only its slope is none."""
    # The root of 0 is 0, but its slope is infinite, and 0 times that is no number.
    steep = jnp.sqrt(jnp.where(batch == 2, 0.0, 1.0) * params["w"] ** 2)
    return steep + jnp.where(batch == 1, jnp.nan, 0.0), extra + 1, {}


@functools.cache
def program(skip):
    step = make_train_step(
        loss,
        optax.adam(1e-3),
        OPTIMIZER,
        total_steps=10,
        accumulate=1,
        momentum=0.9,
        momentum_warmup=False,
        skip_non_finite=skip,
    )
    return jax.jit(step)


def stepped(batch, skip=True):
    teacher = {"w": jnp.float32(5)}
    state = create_state({"w": jnp.float32(3)}, optax.adam(1e-3), jnp.zeros(2), 0, teacher)
    after, metrics = program(skip)(state, jnp.int32(batch))
    unchanged = jax.tree.map(np.array_equal, after.replace(step=state.step), state)
    assert after.step == 1
    return metrics, unchanged


@pytest.mark.parametrize(("batch", "finite"), [(1, [False, True]), (2, [True, False])])
def test_a_step_that_is_no_number_leaves_all_but_the_count_of_steps(batch, finite):
    metrics, unchanged = stepped(batch)
    assert [bool(np.isfinite(metrics[name])) for name in ("loss", "grad_norm")] == finite
    assert all(jax.tree.leaves(unchanged))


def test_a_healthy_step_is_not_left_out_nor_any_where_none_is_to_be():
    for _, unchanged in (stepped(0), stepped(2, skip=False)):
        assert not unchanged.params["w"]
        assert not unchanged.momentum_params["w"]
        assert not unchanged.extra
        assert not unchanged.opt_state[0].count
