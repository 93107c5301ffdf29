"""Settings: parsing of the command line, the checks across fields, and what mistakes say."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from mplug_jax.config import (
    NO_DECAY,
    ConfigError,
    defaults,
    model_config,
    save_config,
)
from mplug_jax.validation import RANGES, validate

ROOT = Path(__file__).resolve().parents[1]
# Prints what the loop would get, without importing the loop.
ECHO = """
from mplug_jax.command_line import run_main
def main(config, workdir, **_):
    print(config.total_steps, config.batch_size, config.seed, config.log_every,
          config.checkpoint_every, config.eval_every, config.init_from, config.data.root,
          config.mesh.data, config.model.fusion.schedule, config.model.fusion.stride, workdir)
run_main(main)
"""


def run(tmp_path: Path, *arguments: str, script: str = ECHO) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "echo.py"
    file.write_text(script)
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_lasting_names_can_be_given_on_the_command_line(tmp_path):
    result = run(
        tmp_path,
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.total_steps=7",
        "--config.batch_size=16",
        "--config.seed=3",
        "--config.log_every=2",
        "--config.checkpoint_every=4",
        "--config.eval_every=5",
        "--config.init_from=runs/other",
        "--config.data.root=/data",
        "--config.mesh.data=1",
        "--config.model.fusion.schedule=official",
        "--config.model.fusion.stride=2",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == (
        f"7 16 3 2 4 5 runs/other /data 1 official 2 {tmp_path / 'run'}".split()
    )


def test_what_follows_the_official_code_is_off_and_can_be_given(tmp_path):
    config = defaults("tiny")
    assert config.optimizer.schedule == "cosine"
    assert config.optimizer.rules == (NO_DECAY,)
    assert config.objectives.teacher_frozen == ()
    assert config.objectives.official_sequence_softmax is False
    result = run(
        tmp_path,
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.optimizer.schedule=official",
        "--config.optimizer.official.epochs=8",
        "--config.optimizer.official.warmup_units=4",
        "--config.optimizer.official.steps_per_epoch=100",
        "--config.optimizer.official.iterations_per_step=2",
        "--config.objectives.teacher_frozen=('^fusion/',)",
        "--config.objectives.official_sequence_softmax=True",
        script="""
from mplug_jax.command_line import run_main
def main(config, workdir, **_):
    official = config.optimizer.official
    print(config.optimizer.schedule, official.epochs, official.warmup_units,
          official.steps_per_epoch, official.iterations_per_step,
          config.objectives.teacher_frozen, config.objectives.official_sequence_softmax)
run_main(main)
""",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "official 8 4 100 2 ('^fusion/',) True"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/quickstart.py", "--config.totl_steps=5"], "'total_steps'"),
        (["--config=configs/quickstart.py", "--config.model.fusion.strid=2"], "fusion.stride"),
        (["--config=configs/quickstart.py", "--config.batch_size=many"], "batch_size=many"),
        # Spelt right, but of another group; after a space; below a value.
        (["--config=configs/quickstart.py", "--config.lr=1"], "'optimizer.lr'"),
        (["--config", "configs/quickstart.py", "--config.totl_steps", "5"], "'total_steps'"),
        (["--config=configs/quickstart.py", "--config.data.root.x=1"], "'data.root'"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        ([], "--config="),
        (["--config=configs/quickstart.py", "total_steps=5"], "total_steps=5"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(tmp_path, arguments, said):
    result = run(tmp_path, f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return 1 / 0\n", ", line 3 failed: ZeroDivisionError: division by zero"),
        ("    config = defaults('tiny')\n    config.totl_steps = 5\n", 'Did you mean "total_steps'),
        ("    return defaults('tny')\n", "base, large, small, tiny"),
        ("    return (\n", "SyntaxError"),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, body, said):
    broken = tmp_path / "broken.py"
    broken.write_text(f"from mplug_jax.config import defaults\ndef get_config():\n{body}")
    result = run(tmp_path, f"--config={broken}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: The config file {broken}")
    assert said in result.stderr
    assert len(result.stderr) < 400  # the library would print the whole config


def test_a_config_file_without_get_config_is_told(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("config = {}\n")
    result = run(tmp_path, f"--config={broken}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert "it defines no get_config()" in result.stderr


def test_a_workdir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path, "--config=configs/quickstart.py", f"--workdir={tmp_path / 'file'}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --workdir={tmp_path / 'file'} cannot be made")


def test_a_missing_workdir_is_asked_for(tmp_path):
    result = run(tmp_path, "--config=configs/quickstart.py")
    assert result.returncode == 2
    assert "--workdir" in result.stderr


def changed(path: str, value: Any) -> ConfigDict:
    config = quickstart.get_config()
    *groups, name = path.split(".")
    group = config
    for key in groups:
        group = group[key]
    group[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("total_steps", 0, "config.total_steps"),
        ("batch_size", 0, "config.batch_size"),
        ("log_every", -1, "config.log_every"),
        ("seed", -1, "config.seed"),
        ("objectives.itc.weight", -1.0, "config.objectives.itc.weight"),
        ("objectives.itc.weight", 0.0, "config.objectives.itm"),
        ("objectives.itc.alpha", 0.4, "momentum"),
        ("objectives.itc.queue_size", 8, "momentum"),
        ("objectives.itm.fraction", 0.0, "itm.fraction"),
        ("objectives.momentum", 1.0, "config.objectives.momentum"),
        ("data.text_length", 100, "max_positions"),
        ("data.train", (), "config.data.train"),
        ("data.max_bad_fraction", 2.0, "max_bad_fraction"),
        ("checkpoint.best_metric", "vqa/accuracy", "best_metric"),
        ("checkpoint.best_mode", "top", "best_mode"),
        ("evals.retrieval.kind", "retrival", "retrieval"),
        ("evals.caption.max_length", 1000, "max_length"),
    ],
)
def test_settings_that_cannot_work_are_named(path, value, said):
    with pytest.raises(ConfigError, match="config") as caught:
        validate(changed(path, value))
    assert said in str(caught.value)


@pytest.mark.parametrize("key", RANGES)
def test_every_number_has_its_range(key):
    low, high = RANGES[key]
    outside = [low - 1, *([high + 1] if high < math.inf else [])]
    for value in outside:
        with pytest.raises(ConfigError, match=f"config.{key} must .*, got {value}"):
            validate(changed(key, value))


@pytest.mark.parametrize(
    ("evaluator", "settings", "said"),
    [
        ("retrieval", {"rerank": 0}, "retrieval.rerank must be at least 1"),
        ("retrieval", {"top": 3}, "see top"),
        ("retrieval", {"score": "sim"}, "retrieval.score='sim' is unknown; choose itm, itm"),
        ("caption", {"limit": -1}, "caption.limit must be at least 0"),
        ("caption", {"beams": 0}, "caption.beams must be at least 1"),
        ("caption", {"memory": "text"}, "caption.memory='text' is unknown; choose image, fused"),
        ("caption", {"procedure": "own"}, "caption.procedure='own'"),
        ("caption", {"min_length": 17}, "caption.min_length=17 must be below max_length=17"),
    ],
)
def test_evaluators_are_checked(evaluator, settings, said):
    config = quickstart.get_config()
    with config.evals.unlocked():
        config.evals[evaluator].update(settings)
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_all_objectives_off_is_an_error():
    config = quickstart.get_config()
    for name in ("itc", "itm", "mlm", "prefix"):
        config.objectives[name].weight = 0.0
    with pytest.raises(ConfigError, match="one of the weights must be positive"):
        validate(config)


def test_the_quickstart_is_valid_and_locked():
    config = quickstart.get_config()
    validate(config)
    with pytest.raises(AttributeError, match="batch_size"):
        config.batchsize = 3


def test_model_config_takes_the_tokenizers_vocabulary_unless_one_is_set():
    config = quickstart.get_config()
    assert model_config(config, 123).text.vocab_size == 123
    config.model.text.vocab_size = 200
    assert model_config(config, 123).text.vocab_size == 200
    with pytest.raises(ConfigError, match="vocab_size=200, but the tokenizer has 300"):
        model_config(config, 300)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.vision.patch_size", (5, 5), "patch_size"),
        ("model.vision.heads", 7, "heads"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.remat", "some", "dots"),
        ("model.fusion.schedule", "papr", "paper, official"),
    ],
)
def test_an_impossible_model_is_a_config_error(path, value, said):
    with pytest.raises(ConfigError, match=r"config\.model") as caught:
        model_config(changed(path, value), 100)
    assert said in str(caught.value)


def test_the_saved_config_holds_every_setting(tmp_path):
    config = defaults("tiny")
    save_config(config, tmp_path)
    text = (tmp_path / "config.json").read_text()
    for key in ("total_steps", "alpha_ramp_steps", "queue_size", "max_bad_fraction", "keep_last"):
        assert f'"{key}"' in text
