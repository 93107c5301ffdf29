"""Moments in the host's memory: the same bits, there and back."""

from __future__ import annotations

import json
import shutil

import jax
import pytest

from mplug_jax.tasks import build_task
from mplug_jax.train import make_program, train
from mplug_jax.training import sharding
from mplug_jax.training.sharding import MeshError, make_mesh
from tests.small_runs import contrast_alone, small_config


def config(offload: bool):
    chosen = contrast_alone(small_config())
    chosen.update({"total_steps": 4, "checkpoint_every": 2, "max_skipped": 1})
    chosen.optimizer.update({"lr": 1e-3, "warmup_steps": 1, "offload": offload})
    with chosen.evals.unlocked():
        del chosen.evals.retrieval
    return chosen


def digest(workdir) -> str:
    return json.loads((workdir / "results.json").read_text())["params_sha256"]


@pytest.mark.slow
def test_an_offloaded_run_ends_with_the_same_bits_and_may_be_continued_without(tmp_path):
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    train(config(False), str(plain))
    train(config(True), str(offloaded))
    assert digest(offloaded) == digest(plain)
    for offload in (True, False):
        shutil.rmtree(offloaded / "checkpoints/4")
        (offloaded / "results.json").unlink()
        train(config(offload), str(offloaded))
        assert digest(offloaded) == digest(plain)


def test_moments_alone_lie_in_the_hosts_memory(tmp_path):
    task = build_task(config(True), str(tmp_path))
    state = make_program(config(True), task, make_mesh({"data": -1})).abstract
    kinds = {
        name: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(getattr(state, name))}
        for name in ("params", "opt_state")
    }
    assert kinds["opt_state"] == {"pinned_host"}
    assert kinds["params"] == {jax.devices()[0].default_memory().kind}


def test_devices_without_such_a_memory_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "HOST", "elsewhere")
    task = build_task(config(True), str(tmp_path))
    with pytest.raises(MeshError, match=r"optimizer.offload: a cpu device has no elsewhere memory"):
        make_program(config(True), task, make_mesh({"data": -1}))
