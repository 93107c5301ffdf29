"""Jumps of the loss: which are told, and which series raise no alarm."""

from __future__ import annotations

import numpy as np
import pytest

from mplug_jax.training.spikes import FEWEST, WINDOW, SpikeCheck


def after(losses, factor: float = 8.0) -> SpikeCheck:
    check = SpikeCheck(factor)
    for step, loss in enumerate(losses, start=1):
        check.see(step, {"loss": float(loss), "grad_norm": 1.0}, [step, step + 1000])
    return check


def decay(steps: int, noise: float, seed: int = 0) -> np.ndarray:
    """From 9 to 2, as a pre-training's loss falls, with noise of a part of its size."""
    falling = 2 + 7 * np.exp(-np.arange(steps) / 300)
    return falling * (1 + noise * np.random.default_rng(seed).standard_normal(steps))


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03, 0.15])
def test_a_noisy_descent_raises_no_alarm(noise, caplog):
    assert sum(after(decay(2000, noise, seed)).spikes for seed in range(3)) == 0
    assert caplog.records == []


def test_a_slow_rise_raises_no_alarm():
    # As the ramp of a distillation's weight lifts a loss.
    rising = 4 + np.arange(1000) / 500 + 0.05 * np.random.default_rng(0).standard_normal(1000)
    assert after(rising).spikes == 0


def test_a_jump_is_told_with_step_value_range_and_records(caplog):
    losses = decay(500, 0.03)
    losses[400] *= 2.5
    assert after(losses).spikes == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith(f"step 401: the loss is {losses[400]:.4g}, where the last 64 steps ")
    last = losses[400 - WINDOW : 400]
    deviation = 1.4826 * np.median(np.abs(last - np.median(last)))
    assert f"let at most {np.median(last) + 8 * deviation:.4g} be expected" in message
    assert message.endswith("records: 401, 1401.")


def test_hard_examples_of_a_model_that_has_learnt_all_raise_no_alarm():
    # Fine-tuned to the end: most losses next to nothing, one in forty ten times as large.
    learnt = np.random.default_rng(0).exponential(0.01, 400)
    learnt[::40] = 0.1
    assert after(learnt).spikes > 0  # where nothing larger was ever seen
    assert after(np.concatenate([decay(500, 0.03), learnt])).spikes == 0
    assert after(np.concatenate([decay(500, 0.03), learnt, [3.0]])).spikes == 1


def test_a_loss_that_stays_high_is_told_once_and_becomes_the_range(caplog):
    losses = np.concatenate([np.full(100, 2.0), np.full(200, 6.0)])
    spikes = after(losses + 0.01 * np.random.default_rng(0).standard_normal(300)).spikes
    assert WINDOW // 2 - 1 <= spikes <= WINDOW // 2 + 1
    assert len(caplog.records) == 1


def test_nothing_is_a_spike_before_enough_losses_are_known_or_at_factor_0():
    early = np.concatenate([np.full(FEWEST - 1, 2.0), [50.0]])
    assert after(early).spikes == 0
    assert after(np.concatenate([np.full(FEWEST, 2.0), [50.0]])).spikes == 1
    assert after(np.concatenate([np.full(100, 2.0), [50.0]]), factor=0.0).spikes == 0
