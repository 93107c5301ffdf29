"""The command: official file to checkpoint and back, towers, and what a user is told."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from mplug_jax.config import ConfigError
from mplug_jax.conversion.report import ConversionError
from mplug_jax.convert import run
from mplug_jax.training.checkpoint import (
    CheckpointError,
    load_params,
    read_params,
    saved_config,
)

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = """
from mplug_jax.config import defaults
from mplug_jax.models.config import DINOV2

def get_config(arg=""):
    config = defaults("base")
    config.model.vision.update({
        "image_size": (12, 12), "patch_size": (4, 4), "width": 12, "depth": 2, "heads": 3,
        "mlp_dim": 20})
    config.model.text.update({
        "vocab_size": 0, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "max_positions": 11})
    config.model.fusion.update({"depth": 3, "stride": 2})
    config.model.decoder.depth = 2
    config.model.embed_dim = 5
    if arg == "dinov2":
        config.model.vision.update({"width": 16, "heads": 2, "mlp_dim": 32, **DINOV2})
    return config
"""


def convert(*arguments) -> str:
    return run(["convert", *map(str, arguments)])


@pytest.fixture
def config_file(tmp_path) -> Path:
    (tmp_path / "small.py").write_text(CONFIG)
    return tmp_path / "small.py"


@pytest.fixture
def official(tmp_path, small) -> Path:
    save_file(small.state, tmp_path / "official.safetensors")
    return tmp_path / "official.safetensors"


def loaded(folder, small):
    """What a run with ``config.init_from`` starts from."""
    empty = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small.params)
    return load_params(folder, empty, (3, 3))


def test_there_and_back(tmp_path, small, official, config_file):
    text = convert("mplug", official, f"--out={tmp_path / 'run'}", f"--config={config_file}")
    assert "text tower" in text and "conversion.txt" in text
    params, folder, todo = loaded(tmp_path / "run", small)
    assert folder == tmp_path / "run" / "checkpoints" / "0" and not todo.describe()
    for name, array in flatten_dict(small.params).items():
        assert np.asarray(flatten_dict(params)[name]).tobytes() == array.tobytes()
    account = (tmp_path / "run" / "conversion.txt").read_text()
    for name in small.state:
        assert re.search(rf"(?m)^  {re.escape(name)}: ", account), name
    saved = saved_config(tmp_path / "run")
    assert saved["model"]["text"]["vocab_size"] == 29
    assert saved["model"]["vision"]["image_size"] == [12, 12]

    convert("export", tmp_path / "run", f"--out={tmp_path / 'back.safetensors'}")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == small.live.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (np.float32, small.state[name].shape)
        assert array.tobytes() == small.state[name].tobytes()


def test_without_a_config_the_sizes_are_read_off(tmp_path, small):
    save_file(small.live, tmp_path / "w.safetensors")
    text = convert(
        "mplug",
        tmp_path / "w.safetensors",
        f"--out={tmp_path / 'run'}",
        "--vision_heads=3",
        "--text_heads=2",
    )
    assert "left at init: 0 parameters" in text
    with pytest.raises(ConversionError, match=r"vision\.width=12 is not a multiple of .*heads=5"):
        convert("mplug", tmp_path / "w.safetensors", "--out=x", "--vision_heads=5")
    model = saved_config(tmp_path / "run")["model"]
    assert model["fusion"] == {"depth": 3, "schedule": "official", "stride": 2}
    loaded(tmp_path / "run", small)


def test_a_config_of_another_model_is_refused(tmp_path, official, config_file):
    with pytest.raises(ConversionError) as error:
        convert(
            "mplug",
            official,
            f"--out={tmp_path / 'run'}",
            f"--config={config_file}",
            "--config.model.vision.width=18",
            "--config.model.decoder.depth=1",
        )
    assert str(error.value).splitlines()[1:] == [
        "  model.vision.width: 12 in the file, 18 in the config",
        "  model.decoder.depth: 2 in the file, 1 in the config",
    ]
    assert not (tmp_path / "run").exists()


def test_unexpected_tensors_must_be_named(tmp_path, small, config_file):
    save_file(small.state | {"extra.bias": np.ones(2)}, tmp_path / "w.safetensors")
    command = ("mplug", tmp_path / "w.safetensors", f"--config={config_file}")
    with pytest.raises(ConversionError, match=r"not in the model: extra\.bias"):
        convert(*command, f"--out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
    convert(*command, f"--out={tmp_path / 'run'}", "--expect_unused=^extra")
    assert "--expect_unused=^extra" in (tmp_path / "run" / "conversion.txt").read_text()
    with pytest.raises(ConversionError, match=r"w\.safetensors cannot be made: File exists"):
        convert(*command, f"--out={tmp_path / 'w.safetensors'}", "--expect_unused=^extra")
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        convert(*command, f"--out={tmp_path / 'run'}", "--expect_unused=^extra")


def test_other_names_can_be_renamed(tmp_path, small, config_file):
    state = {n.replace("text_encoder.", "txt."): a for n, a in small.live.items()}
    save_file(state, tmp_path / "w.safetensors")
    convert(
        "mplug",
        tmp_path / "w.safetensors",
        f"--config={config_file}",
        f"--out={tmp_path / 'run'}",
        "--rename=txt.=text_encoder.",
    )
    loaded(tmp_path / "run", small)


def test_towers(tmp_path, config_file):
    text = convert(
        "towers",
        f"--vision={FIXTURES / 'dinov2.safetensors'}",
        f"--text={FIXTURES / 'bert.safetensors'}",
        f"--config={config_file}:dinov2",
        "--config.seed=4",
        f"--out={tmp_path / 'run'}",
    )
    assert "DINOv2" in text and "BERT of 3 layers" in text
    params, _ = read_params(tmp_path / "run")
    saved = saved_config(tmp_path / "run")
    vision = saved["model"]["vision"]
    assert (vision["activation"], vision["layer_scale"]) == ("gelu", 1.0)
    flat = flatten_dict(params, sep="/")
    account = (tmp_path / "run" / "conversion.txt").read_text()
    for path in flat:
        assert re.search(rf"(?m)[ ]{re.escape(path)}(: | \[|, |$)", account), path
    scale = load_file(FIXTURES / "dinov2.safetensors")["encoder.layer.1.layer_scale1.lambda1"]
    np.testing.assert_array_equal(flat["visual_encoder/blocks/layer_scale_1/scale"][1], scale)


def test_inspect(small, official):
    text = convert("inspect", official)
    assert "official mPLUG\n  vision.image_size: (12, 12)" in text
    assert "  visn_fc.weight: (16, 12) float32" in text
    text = convert("inspect", FIXTURES / "clip.safetensors")
    assert "CLIP in Hugging Face naming" in text and "vision.mlp_dim: 24" in text
    assert "BERT of 3 layers\n  text.vocab_size: 29" in convert(
        "inspect", FIXTURES / "bert.safetensors"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --out"),
        (["--out=x"], "Unknown command ''"),
        (["mplg", "a", "--out=x"], "Unknown command 'mplg a'"),
        (["mplug", "--out=x"], "Unknown command 'mplug'"),
        (["mplug", "nowhere.pth", "--out=x"], "nowhere.pth cannot be read: No such file"),
        (["mplug", "nowhere.pth"], "Give --out"),
        (["mplug", "a", "--outt=x"], "outt"),
        (["mplug", "a", "--out=x", "--config=nowhere.py"], "nowhere.py cannot be read"),
        (["towers", "--out=x"], "Give --config, and --vision"),
        (["export", "nowhere", "--out=x.pth"], "CHECKPOINT={cwd}/nowhere: no checkpoint there"),
        (["inspect", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConversionError, CheckpointError, ConfigError)) as error:
        convert(*arguments)
    assert message.format(cwd=tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_does_not_exist_is_told(config_file):
    with pytest.raises(ConversionError, match=r"config\.model\.vison\.width does not exist"):
        convert(
            "towers",
            f"--config={config_file}",
            "--config.model.vison.width=3",
            "--out=x",
            "--text=y",
        )


def test_a_mistake_ends_with_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mplug_jax.convert", "inspect", str(tmp_path / "no.pth")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr == f"error: {tmp_path / 'no.pth'} cannot be read: No such file or directory.\n"
    )


def test_help_names_the_commands():
    text = convert("--help")
    assert "mplug FILE --out=DIR" in text and "--expect_unused" in text
