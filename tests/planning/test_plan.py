"""The command: its output, and what it says of mistakes."""

import json
import subprocess
import sys

import jax
import pytest

from mplug_jax.config import ConfigError
from mplug_jax.plan import mesh_shape
from mplug_jax.planning import forecast as forecast_module
from mplug_jax.planning.chips import CHIPS, PlanError
from mplug_jax.planning.forecast import USABLE, forecast, suggest
from mplug_jax.planning.memory import forecast_memory, largest_rows, with_rows
from mplug_jax.planning.program import build_program
from mplug_jax.planning.report import as_json, as_text, figures
from mplug_jax.training.sharding import MeshError, make_mesh
from tests.planning.small_programs import tiny_config


@pytest.mark.slow
def test_a_forecast_in_words_and_as_json():
    config = tiny_config(batch_size=64)
    plan = forecast(config, {"data": 8}, 8, "h100", "never")
    numbers = figures(plan)
    assert numbers["images_per_second"] == pytest.approx(64 / numbers["step_seconds"])
    assert numbers["days"] * 86_400 == pytest.approx(config.total_steps * numbers["step_seconds"])
    assert numbers["device_hours"] == pytest.approx(numbers["days"] * 24 * 8)
    peak = 8 * CHIPS["h100"].peak["float32"]
    achieved = plan.model_flops / numbers["step_seconds"]
    assert numbers["mfu"] == pytest.approx(achieved / peak)
    assert numbers["fits"] and plan.suggestion == ""
    text = as_text(plan)
    for part in ("8 x h100 (data:8)", "8 a device", "not compiled: --compile=never", "binds"):
        assert part in text
    data = json.loads(json.dumps(as_json(plan)))
    assert data["figures"]["bytes"] == pytest.approx(plan.total)
    assert sum(data["parameters"].values()) == sum(plan.parameters.values())


@pytest.mark.slow
def test_the_compiled_numbers_replace_the_formulas(monkeypatch):
    compiled = forecast_module.Compiled(1.0, 3e8, [], 2.0)
    monkeypatch.setattr(forecast_module, "compile_apart", lambda *_, **__: compiled)
    plan = forecast(tiny_config(), {"data": 1}, 1, "h100", "always")
    # float32 without remat: there is little to correct.
    assert plan.corrected == pytest.approx(3e8, rel=0.03)
    assert plan.total == plan.memory.state + plan.memory.batch + plan.corrected
    assert "compiled program" in as_text(plan)
    monkeypatch.setattr(forecast_module, "compile_apart", lambda *_, **__: None)
    plan = forecast(tiny_config(), {"data": 1}, 1, "h100", "auto")
    assert "not compiled within" in as_text(plan)
    assert plan.total == plan.memory.total


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not():
    config, mesh = tiny_config(batch_size=64), make_mesh({"data": 8})

    def total(rows):
        changed = with_rows(config, mesh, rows)
        return forecast_memory(changed, build_program(changed, mesh)).total

    known = forecast_memory(config, build_program(config, mesh))
    room = 2.5 * known.total
    rows = largest_rows(config, mesh, room, known)
    assert rows > 8
    assert total(rows) <= 1.03 * room
    assert total(rows + 2) > 0.97 * room
    assert largest_rows(config, mesh, known.state / 2, known) == 0


@pytest.mark.slow
def test_what_does_not_fit_gets_a_suggestion_that_does():
    config, mesh = tiny_config(), make_mesh({"data": 1}, jax.devices()[:1])
    memory = forecast_memory(config, build_program(config, mesh))
    needed = memory.total
    words = suggest(config, mesh, 0.7 * needed, memory.state)
    assert words.startswith("--config.model.remat=")
    changed = tiny_config(**{"model.remat": words.split("=")[1]})
    assert forecast_memory(changed, build_program(changed, mesh)).total <= 0.7 * needed
    assert suggest(config, mesh, 1e6, memory.state).startswith("more devices")
    assert 0 < USABLE < 1


@pytest.mark.slow
def test_split_parameters_are_suggested_where_the_state_is_too_large():
    config, mesh = tiny_config(batch_size=8), make_mesh({"data": 8})
    memory = forecast_memory(config, build_program(config, mesh))
    assert "fsdp:2" in suggest(config, mesh, 0.99 * memory.total, 2 * memory.total)


def test_a_vocabulary_that_is_learnt_is_an_assumption():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    config = tiny_config(**{"model.text.vocab_size": 0})
    config.data.tokenizer.vocab_size = 700
    program = build_program(config, mesh)
    assert program.assumptions == ("a vocabulary of 700 tokens (config.data.tokenizer.vocab_size)",)
    assert program.state.params["decoder"]["embeddings"]["word"]["embedding"].shape[0] == 700
    config.data.tokenizer.vocab_size = 0
    assert "30,522" in build_program(config, mesh).assumptions[0]


@pytest.mark.parametrize("text", ["", "data", "data:0", "rows:8", "data:2,data:4", "data:-1"])
def test_a_mesh_that_is_none(text):
    with pytest.raises(PlanError, match=r"none of data:<devices>, fsdp:<devices>"):
        mesh_shape(text)


def test_a_mesh():
    assert mesh_shape("data:8,fsdp:4, tensor:2") == {"data": 8, "fsdp": 4, "tensor": 2}


def test_mistakes_are_told():
    with pytest.raises(PlanError, match="--chip=h1 is unknown"):
        forecast(tiny_config(), {"data": 1}, 1, "h1", "never")
    with pytest.raises(PlanError, match="--compile=no is unknown; choose auto, always, never"):
        forecast(tiny_config(), {"data": 1}, 1, "h100", "no")
    with pytest.raises(MeshError, match="batch_size=12 does not divide over the 8 parts"):
        forecast(tiny_config(batch_size=12), {"data": 8}, 8, "h100", "never")
    with pytest.raises(MeshError, match="does not divide its axis"):
        forecast(tiny_config(**{"model.text.mlp_dim": 511}), {"tensor": 2}, 2, "h100", "never")
    with pytest.raises(ConfigError, match=r"config\.batch_size must be at least 1"):
        forecast(tiny_config(batch_size=0), {"data": 1}, 1, "h100", "never")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=data:8"], "Give --config"),
        (["--mesh=data:8", "--chip=h101"], "--chip=h101 is unknown; choose a100-40"),
        (["--mesh=data:7", "--chip=h100"], "does not divide over the 7 parts"),
    ],
)
def test_the_command_tells_a_mistake_in_one_line(arguments, message):
    command = [sys.executable, "-m", "mplug_jax.plan", "--config=configs/pretrain_base.py"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_takes_the_config_of_a_run(tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({**tiny_config().to_dict(), "batch_size": 20}))
    command = [sys.executable, "-m", "mplug_jax.plan", "--mesh=data:8", "--chip=h100"]
    command += [f"--config={saved}", "--config.accumulate=2", "--compile=never"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = "batch_size=20 does not divide over the 8 parts"
    assert said in done.stderr and "accumulate=2" in done.stderr
