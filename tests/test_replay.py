"""A batch that broke a run, looked at again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import saved_config
from mplug_jax.config import ConfigError
from mplug_jax.replay import culprits, replay
from mplug_jax.tasks import build_task
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.train import train, training_iterator
from mplug_jax.training.finite import NonFiniteError
from mplug_jax.training.metrics import read_metrics
from tests.test_command_line import command
from tests.test_resume import get_config

BROKEN, CHECKPOINT = 5, 3


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (stat.st_mtime_ns, stat.st_size) for path, stat in found}


@pytest.fixture
def poison(tmp_path, monkeypatch):
    """An image_id of the batch of step 5; its MLM loss is no number, by the decoder's doing."""
    config = get_config()
    iterator = training_iterator(config, build_task(config, str(tmp_path / "look")))
    batches = [next(iterator)["image_id"].tolist() for _ in range(BROKEN)]
    iterator.close()
    loss, chosen = Pretrain.loss, batches[-1][6]
    assert all(chosen not in batch for batch in batches[:-1])

    def poisoned(self, params, momentum_params, extra, batch, rng, step):
        value, extra, metrics = loss(self, params, momentum_params, extra, batch, rng, step)
        bad = (batch["image_id"] == chosen).any()
        broken = jnp.where(bad, jnp.nan, 0.0)
        value += broken * next(_leaves(params["decoder"])).sum()
        return value, extra, metrics | {"loss_mlm": metrics["loss_mlm"] + broken}

    monkeypatch.setattr(Pretrain, "loss", poisoned)
    return chosen, batches[-1]


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]


@pytest.mark.slow
def test_the_command_that_is_told_names_record_term_and_parameters(poison, tmp_path, capsys):
    chosen, ids = poison
    workdir = tmp_path / "my run"
    with pytest.raises(NonFiniteError) as error:
        train(get_config(), str(workdir))
    assert "loss_mlm=nan" in str(error.value)
    told = re.search(r"python -m mplug_jax\.replay (.*)", str(error.value))[1]
    given = dict(part.removeprefix("--").split("=", 1) for part in shlex.split(told))
    assert given["step"] == str(BROKEN)
    before = files(workdir)
    config = saved_config.get_config(given["config"])
    replayed = replay(config, given["workdir"], int(given["step"]))
    assert files(workdir) == before
    assert replayed.ids == ids
    assert replayed.culprits == [chosen]
    assert replayed.inputs == []
    assert {name.split("/")[0] for name in replayed.groups} == {"decoder"}
    odd = {name for name, value in replayed.metrics.items() if not np.isfinite(value)}
    assert odd == {"loss", "loss_mlm", "grad_norm"}
    said = capsys.readouterr().out
    assert f"step 5, from the state of step {CHECKPOINT}, 1 steps trained again:" in said
    assert f"that break a batch of themselves alone: {chosen}\n" in said
    # A healthy step, of which the run has recorded what it did.
    healthy = replay(config, given["workdir"], 4)
    assert (healthy.groups, healthy.culprits) == ([], [])
    recorded = next(line for line in read_metrics(workdir) if line["step"] == 4)
    for name, value in healthy.metrics.items():
        assert value == pytest.approx(recorded[f"train/{name}"], rel=1e-4), name


def test_rows_that_are_broken_by_themselves_are_found_by_halving():
    asked = []

    def broken(rows):
        asked.append(rows.tolist())
        return bool({3, 12} & set(rows.tolist()))

    assert culprits(np.arange(16), broken) == [3, 12]
    assert len(asked) <= 1 + 2 * 2 * 4
    # Nothing is broken but by all of them together.
    assert culprits(np.arange(4), lambda rows: len(rows) == 4) == []


def test_a_step_that_the_run_does_not_have_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"--step=7: the run has the steps 1 to 6\."):
        replay(get_config(), str(tmp_path), 7)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--workdir=.", "--step=last"), "--step=last is no number"),
        (("--workdir=nowhere", "--step=3"), "--workdir=nowhere is no folder."),
        (("--step=3",), "Give --config=<workdir>/config.json"),
    ],
)
def test_mistakes_in_the_command_are_told(flags, said):
    result = command("-m", "mplug_jax.replay", "--config=configs/quickstart.py", *flags)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
