"""The command of training as a user meets it: its flags, and one message for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("totl_steps=5", "'total_steps'"),
        ("modle.vision.depth=1", "Did you mean 'model.vision.depth' or "),
        ("data.tokenizer.kind=bpe", "tokenizer.kind is 'bpe'"),
    ],
)
def test_the_command_ends_with_one_message(tmp_path, override, said):
    result = command(
        *("-m", "mplug_jax.train", "--config=configs/quickstart.py"),
        *(f"--workdir={tmp_path}", f"--config.{override}"),
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_divergence_is_a_message_though_its_module_is_main(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "from mplug_jax.command_line import run_main\n"
        "class NonFiniteError(FloatingPointError): pass\n"
        "def main(config, workdir, **_):\n"
        "    raise NonFiniteError('step 3: loss=nan') if config.seed == 0 else ValueError('bug')\n"
        "run_main(main)\n"
    )
    flags = ("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}")
    told = command(str(script), *flags)
    assert (told.returncode, told.stderr) == (2, "error: step 3: loss=nan\n")
    bug = command(str(script), *flags, "--config.seed=1")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr


@pytest.mark.parametrize("flags", [(), ("--allow_config_change",)])
def test_the_flag_that_allows_a_change(tmp_path, flags):
    script = tmp_path / "main.py"
    script.write_text(
        "from mplug_jax.command_line import run_main\n"
        "run_main(lambda config, workdir, allow_config_change: print(allow_config_change))\n"
    )
    told = command(
        str(script), "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert told.stdout == f"{bool(flags)}\n"
