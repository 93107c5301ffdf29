"""A checkpoint evaluated by itself: its run's figures, and what is missing is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mplug_jax import train as train_lib
from mplug_jax.config import ConfigError, classification_eval, save_config
from mplug_jax.data.records import SourceError
from mplug_jax.evaluate import default_workdir, evaluate, table
from mplug_jax.saved_config import from_settings, get_config
from mplug_jax.tasks.restored import for_use, restore
from mplug_jax.tasks.setup import prepare
from mplug_jax.training.checkpoint import CheckpointError
from mplug_jax.training.sharding import make_mesh
from tests.small_runs import random_checkpoint, small_config

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = {"kind": "scenes", "level": "easy", "split": "val", "size": 8}


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Stands for the compiled step: other parameters at every step."""
    params = jax.tree.map(lambda x: x * 1.5, state.params)
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    return state.replace(step=state.step + 1, params=params), metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A training run of two steps with a checkpoint after each."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "_compile", lambda *_: (step, 1000))
        train_lib.train(small_config(), str(workdir))
    return workdir


def results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def test_the_last_checkpoint_gives_exactly_the_runs_figures(run, tmp_path, capsys):
    config = get_config(str(run / "config.json"))
    assert config.to_dict() == small_config().to_dict()
    config.published = (("retrieval/txt_r1", 82.8),)
    found = evaluate(config, str(run), str(tmp_path))
    assert results(tmp_path) == results(run)
    assert results(tmp_path)["step"] == 2
    assert found == {k: v for k, v in results(run).items() if "/" in k}
    said = capsys.readouterr().out
    assert table(found, {"retrieval/txt_r1": 82.8}) in said
    assert "published 82.8" in said
    assert f"parameters of {run / 'checkpoints' / '2'}\n" in said
    for name in ("captions.json", "captions.png", "retrieval.json", "retrieval.png"):
        theirs = (run / "samples" / name).read_bytes()
        assert (tmp_path / "samples" / name).read_bytes() == theirs
    assert get_config(str(tmp_path / "config.json")).to_dict() == config.to_dict()
    # An earlier one is another model.
    evaluate(config, str(run / "checkpoints" / "1"), str(tmp_path))
    assert results(tmp_path)["step"] == 1
    assert results(tmp_path)["params_sha256"] != results(run)["params_sha256"]


@pytest.mark.slow
def test_the_figures_do_not_depend_on_the_mesh(run, tmp_path):
    config = small_config()
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    found = evaluate(config, str(run), str(tmp_path))
    assert results(tmp_path)["params_sha256"] == results(run)["params_sha256"]
    assert found == pytest.approx({k: v for k, v in results(run).items() if "/" in k}, abs=1e-4)


class Recorder:
    """Stands for the evaluators, which take seconds to compile."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def build(self, setup: Any, mesh: Any) -> dict[str, Any]:
        self.seen.append(setup)
        return dict.fromkeys(setup.config.evals, lambda params, samples: {"x": 1.0})


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    for task in ("pretrain", "finetune"):
        monkeypatch.setattr(f"mplug_jax.tasks.{task}.build_evaluators", recorder.build)
    return recorder


def test_no_training_data_is_read_and_the_tokenizer_is_the_checkpoints(run, tmp_path, recorder):
    config = small_config()
    config.data.train = ({"kind": "captions", "path": "nowhere.json"},)
    config.data.root = str(tmp_path / "nowhere")
    config.data.tokenizer.texts = ({"kind": "captions", "path": "nowhere.json"},)
    # Another tokenizer, of an earlier evaluation, has no say.
    (tmp_path / "tokenizer.model").write_bytes(b"of another run")
    evaluate(config, str(run), str(tmp_path))
    used = recorder.seen[0].tokenizer
    original = prepare(for_use(small_config(), run / "checkpoints" / "2"), "").tokenizer
    assert (
        used.encode("a red square", 8)[0].tolist() == original.encode("a red square", 8)[0].tolist()
    )
    assert recorder.seen[0].sources == []
    assert results(tmp_path)["retrieval/x"] == 1.0


def test_held_out_data_that_is_missing_is_told(run, tmp_path):
    config = small_config()
    config.data.root = str(tmp_path)
    with config.evals.unlocked():
        config.evals.caption.source = {"kind": "captions", "path": "val.json"}
    with pytest.raises(SourceError, match=r"there is no file .*val\.json"):
        evaluate(config, str(run), str(tmp_path / "out"))


def test_larger_pictures_resample_the_positions(run, tmp_path, recorder, capsys):
    config = small_config()
    config.model.vision.image_size = (64, 64)
    evaluate(config, str(run), str(tmp_path))
    assert "positions resampled: visual_encoder/position_embedding" in capsys.readouterr().out


def classified(task: str = "snli_ve") -> ConfigDict:
    config = small_config(task)
    config.model.classes = 3
    return config


def test_a_classifier_may_be_missing_only_where_nothing_judges_it(run, tmp_path, recorder, capsys):
    config = classified()
    evaluate(config, str(run), str(tmp_path))
    said = capsys.readouterr().out
    assert "not in the checkpoint, and read by no evaluator: classifier/hidden/bias" in said
    with config.evals.unlocked():
        config.evals.snli_ve = classification_eval(HELD_OUT, limit=8)
    with pytest.raises(CheckpointError, match=r"no classifier for config\.evals\.snli_ve to judge"):
        evaluate(config, str(run), str(tmp_path))


def test_a_vocabulary_that_was_not_trained_is_an_error(run, tmp_path, recorder):
    config = small_config("grounding")
    with pytest.raises(CheckpointError, match=r"has \d+ tokens, more than .* trained with"):
        evaluate(config, str(run), str(tmp_path))


def test_another_model_is_an_error_that_lists_the_differences(run, tmp_path, recorder):
    config = small_config()
    config.model.embed_dim = 8
    with pytest.raises(CheckpointError, match=r"text_proj/kernel: \(32, 16\) in the checkpoint"):
        evaluate(config, str(run), str(tmp_path))


def test_what_the_parameters_become_is_what_was_saved(tmp_path):
    workdir = random_checkpoint(tmp_path / "run", small_config())
    folder = workdir / "checkpoints" / "0"
    setup = prepare(for_use(small_config(), folder), "")
    first, second = (
        restore(folder, setup.model_config, make_mesh({"data": 1}, jax.devices()[n : n + 1]))
        for n in (0, 1)
    )
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), *(first[0], second[0])
    )
    assert all(jax.tree.leaves(same))
    assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(first.params))
    assert first.step == 0


def test_a_config_without_evaluators_is_told(run, tmp_path):
    config = small_config()
    with config.unlocked():
        config.evals = ConfigDict()
    with pytest.raises(ConfigError, match="names no evaluator"):
        evaluate(config, str(run), str(tmp_path))


def test_nothing_at_the_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"--checkpoint=.*nowhere: no checkpoint there"):
        evaluate(small_config(), str(tmp_path / "nowhere"), str(tmp_path))


def test_the_workdir_is_named_by_config_and_step(run):
    assert default_workdir(str(run), "x") == run / "evaluation" / "x-2"
    first = run / "checkpoints" / "1"
    assert default_workdir(str(first), "x") == run / "evaluation" / "x-1"


def test_the_table_names_an_evaluator_once():
    lines = table({"a/r1": 12.5, "a/median": 3.0, "b/r1": 0.25}, {}).splitlines()
    assert lines == ["a", "  r1           12.5", "  median          3", "b", "  r1           0.25"]


def test_the_papers_figures_stand_beside_ours_and_alone_where_there_is_none():
    found = {"val/cider": 30.0, "test/cider": 139.25, "test/words": 9.0}
    assert table(found, {"test/cider": 141.0, "test/spice": 23.7}).splitlines() == [
        *("val", "  cider         30"),
        *("test", "  cider      139.2  published 141", "  words          9"),
        "  spice          -  published 23.7",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"totl_steps": 3}, r"config\.totl_steps does not exist"),
        ({"model": {"vision": {"widht": 3}}}, r"config\.model\.vision\.widht does not exist"),
        ({"seed": "three"}, r"config\.seed='three' has another type"),
    ],
)
def test_a_saved_config_that_does_not_fit_is_told(change, said):
    with pytest.raises(ConfigError, match=said):
        from_settings(change)


def test_a_saved_config_of_before_a_setting_has_its_default(tmp_path):
    save_config(small_config(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["finetune"]["grounding"]
    config = from_settings(settings)
    assert config.finetune.grounding.bins == 337
    config.init_from = "runs/x"  # a placeholder still, though JSON has null
    with pytest.raises(ConfigError, match="no JSON"):
        (tmp_path / "config.json").write_text("{")
        get_config(str(tmp_path / "config.json"))


# Prints what evaluate gets, without importing a model.
ECHO = """
from pathlib import Path
from mplug_jax.command_line import run_evaluation
def main(config, checkpoint, workdir):
    print(config.seed, config.data.train[0]["kind"], checkpoint, Path(workdir).name)
run_evaluation(main, lambda checkpoint, name: Path(checkpoint) / name)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_saved_config_is_read_and_changed_on_the_command_line(tmp_path):
    echo, saved, checkpoint = tmp_path / "echo.py", tmp_path / "mine", tmp_path / "theirs"
    echo.write_text(ECHO)
    saved.mkdir()
    save_config(small_config(), saved)
    file = saved / "config.json"
    flags = (f"--checkpoint={checkpoint}", "--config.seed=7")
    for given in ((f"--config={file}",), ("--config", str(file))):
        assert command(str(echo), *given, *flags).stdout.split() == (
            ["7", "scenes", str(checkpoint), "mine"]
        )
    wrong = command(str(echo), f"--config={file}", "--config.totl_steps=7")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "error: config.totl_steps does not exist. Did you mean 'total_steps'?\n"
    )
    missing = command(str(echo), f"--config={saved / 'none.json'}", *flags)
    assert missing.stderr.startswith(f"error: The config file {saved / 'none.json'} cannot be read")
    nothing = command(str(echo), f"--config={file}")
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("error: Give --config=")
    assert "--checkpoint=" in nothing.stderr


@pytest.mark.slow
def test_the_command_evaluates_a_run_by_its_own_config(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = command(
        *("-m", "mplug_jax.evaluate", f"--config={copy / 'config.json'}", f"--checkpoint={copy}")
    )
    assert done.returncode == 0, done.stderr
    folder = copy / "evaluation" / "copy-2"
    assert f"results in {folder}" in done.stdout
    assert results(folder)["params_sha256"] == results(run)["params_sha256"]
    assert results(folder).keys() == results(run).keys()
