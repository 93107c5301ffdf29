"""Forecasts against compiled programs."""

import functools
import math

import jax
import pytest

from mplug_jax.planning.collectives import formula_collectives
from mplug_jax.planning.compiled import QUICKLY
from mplug_jax.planning.hlo import collectives_of
from mplug_jax.planning.memory import PACKING, device_usage, forecast_memory, gathered_on_device
from mplug_jax.planning.program import lower
from mplug_jax.training.flops import matmul_flops
from mplug_jax.training.sharding import on_mesh
from tests.planning.small_programs import small_config, small_program

CASES = {
    "one device": ({"data": 1}, {}),
    "one device, full": ({"data": 1}, {"model.remat": "full"}),
    "eight devices": ({"data": 8}, {"batch_size": 64}),
    "eight shards": ({"fsdp": 8}, {"batch_size": 64}),
    "eight pools": ({"data": 8}, {"batch_size": 64, "objectives.itm.pool": 8}),
}


@functools.cache
def case(name):
    """(config, program, compiled) of a case."""
    shape, changes = CASES[name]
    config = small_config(**changes)
    program = small_program(config, shape)
    return config, program, lower(program).compile(QUICKLY)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_compiled_program(name):
    config, program, compiled = case(name)
    memory, truth = forecast_memory(config, program), compiled.memory_analysis()
    assert memory.state + memory.batch == pytest.approx(truth.argument_size_in_bytes, rel=0.01)
    # As the CPU backend has it, to which remat means less than to a GPU's or a TPU's.
    walk = device_usage(config, program, on_cpu=True).peak + gathered_on_device(config, program)
    assert PACKING * walk == pytest.approx(truth.temp_size_in_bytes, rel=0.15)
    if config.model.remat == "none":
        assert memory.temporaries == pytest.approx(PACKING * walk, rel=0.01)
    else:
        assert memory.temporaries < 0.6 * PACKING * walk


def _sent(collectives, *kinds):
    return sum(each.sent for each in collectives if each.kind in kinds)


@pytest.mark.slow
def test_exchanges_are_those_of_the_compiled_program():
    config, program, compiled = case("eight devices")
    formula = formula_collectives(config, program)
    found = collectives_of(compiled.as_text(), 8)
    for kind, tolerance in (("all-reduce", 0.1), ("all-gather", 0.25)):
        assert _sent(formula, kind) == pytest.approx(_sent(found, kind), rel=tolerance)
    # The formulas leave out how rows of texts are put into order.
    assert _sent(found, "collective-permute") < 0.15 * sum(each.sent for each in found)


@pytest.mark.slow
def test_pairs_send_nothing_where_a_device_holds_whole_pools():
    config, program, compiled = case("eight pools")
    formula = formula_collectives(config, program)
    found = collectives_of(compiled.as_text(), 8)
    for kind, tolerance in (("all-reduce", 0.1), ("all-gather", 0.25)):
        assert _sent(formula, kind) == pytest.approx(_sent(found, kind), rel=tolerance)
    assert not _sent(found, "collective-permute")


def test_pairs_are_exchanged_among_the_devices_of_a_pool():
    program = small_program(small_config(batch_size=64), {"data": 8})
    for pool, devices in ((0, 8), (64, 8), (128, 8), (32, 4), (16, 2), (8, 1), (4, 1)):
        config = small_config(batch_size=64, **{"objectives.itm.pool": pool})
        found = {c.name: c for c in formula_collectives(config, program) if "pairs" in c.name}
        assert len(found) == (5 if devices > 1 else 0)
        if found:
            pictures = found["pictures of pairs"]
            assert pictures.group == devices
            # Keys and values of three cross layers and the tokens: float32, 17 of them, 128 wide.
            assert pictures.size == 7 * 4 * 17 * 128 * 8 * devices


@pytest.mark.slow
def test_split_parameters_are_gathered_and_their_gradients_scattered():
    config, program, compiled = case("eight shards")
    formula = formula_collectives(config, program)
    found = collectives_of(compiled.as_text(), 8)
    assert _sent(formula, "all-gather") == pytest.approx(_sent(found, "all-gather"), rel=0.15)
    # The CPU backend has no reduce-scatter: it all-reduces, which sends twice as much.
    reduced = _sent(formula, "all-reduce") + 2 * _sent(formula, "reduce-scatter")
    assert reduced == pytest.approx(_sent(found, "all-reduce"), rel=0.15)


def test_gradients_are_reduced_once():
    config = small_config(batch_size=64)
    program = small_program(config, {"data": 8})
    params = program.state.params
    size = 4 * sum(x.size for x in jax.tree.leaves(params))
    tied = [params[name]["embeddings"]["word"]["embedding"] for name in ("text_encoder", "decoder")]
    size += 4 * sum(x.size for x in tied)  # the embedding's and the head's
    (gradients,) = [c for c in formula_collectives(config, program) if c.name == "gradients"]
    assert gradients.sent == pytest.approx(2 * 7 / 8 * size)
    program = small_program(small_config(batch_size=64, accumulate=2), {"data": 8})
    twice = formula_collectives(small_config(batch_size=64, accumulate=2), program)
    assert next(c for c in twice if c.name == "gradients").sent == 2 * gradients.sent


def test_one_device_sends_nothing():
    config = small_config()
    assert formula_collectives(config, small_program(config, {"data": 1})) == []


@pytest.mark.slow
def test_the_state_is_split_as_the_mesh_says():
    config = small_config(batch_size=64)
    whole, split = (
        forecast_memory(config, small_program(config, shape))
        for shape in ({"data": 8}, {"fsdp": 8})
    )
    assert split.state < 0.14 * whole.state
    assert split.gradients < 0.14 * whole.gradients
    assert whole.optimizer == pytest.approx(2 * whole.params, rel=0.01)
    assert whole.teacher == whole.params


@pytest.mark.slow
def test_flops_are_those_of_the_unrolled_program():
    """XLA counts a scan's body once, so every layer is unrolled; it counts element-wise work too,
    which wide layers make small."""
    config = small_config(**{"model.scan_unroll": 100, "batch_size": 4})
    config.model.vision.update({"width": 768, "depth": 2, "heads": 4, "mlp_dim": 3072})
    config.model.text.update({"width": 768, "depth": 2, "mlp_dim": 3072})
    config.model.fusion.update({"depth": 2, "stride": 1})
    config.model.decoder.depth = 2
    config.objectives.itc.queue_size = 64
    program = small_program(config, {"data": 1})
    with on_mesh(program.mesh):
        counted = matmul_flops(program.step, program.state, program.batch)
        lowered = lower(program)
    elementwise = 20 * sum(math.prod(x.shape) for x in jax.tree.leaves(program.state.params))
    truth = lowered.cost_analysis()["flops"] - elementwise
    assert counted == pytest.approx(truth, rel=0.02)


@pytest.mark.slow
def test_recomputation_adds_flops_and_no_model_flops():
    plain, remat = (
        small_program(small_config(**{"model.remat": policy}), {"data": 1})
        for policy in ("none", "full")
    )

    def flops(program, step):
        with on_mesh(program.mesh):
            return matmul_flops(step, program.state, program.batch)

    model = flops(plain, plain.step)
    assert flops(remat, remat.step_without_remat) == model
    # A forward pass of a third, without the teacher's.
    assert 1.1 * model < flops(remat, remat.step) < 1.35 * model
