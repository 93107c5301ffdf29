"""The hash of parameters, and the state a run begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mplug_jax.training.sharding import make_mesh
from mplug_jax.training.state import create_state, params_sha256, part_of, path_name


def tree():
    return {
        "layer": {"kernel": np.arange(16, dtype=np.float32).reshape(8, 2), "bias": np.zeros(2)},
        "scale": np.float32(3.0),
    }


def changed(**changes):
    return {**tree(), "layer": {**tree()["layer"], **changes}}


def test_hash_is_a_sha256_that_repeats():
    assert params_sha256(tree()) == params_sha256(tree())
    assert len(bytes.fromhex(params_sha256(tree()))) == 32


def nudged():
    kernel = tree()["layer"]["kernel"].copy()
    kernel[7, 1] = np.nextafter(kernel[7, 1], np.float32(99))
    return kernel


@pytest.mark.parametrize(
    "other",
    [
        changed(kernel=nudged()),
        changed(kernel=tree()["layer"]["kernel"].reshape(2, 8)),
        changed(kernel=tree()["layer"]["kernel"].astype(np.float64)),
        changed(extra=np.zeros(0, np.float32)),
        {"layer": tree()["layer"], "scales": tree()["scale"]},
        {"layer": tree()["layer"]},
        {"stack": {"layer": tree()["layer"]}, "scale": tree()["scale"]},
    ],
    ids=["value", "shape", "dtype", "empty leaf", "name", "missing", "nesting"],
)
def test_hash_sees_any_change(other):
    assert params_sha256(other) != params_sha256(tree())


def test_hash_sees_two_leaves_swapped():
    first, second = np.zeros(3, np.float32), np.ones(3, np.float32)
    swapped = params_sha256({"a": second, "b": first})
    assert params_sha256({"a": first, "b": second}) != swapped


def test_hash_ignores_the_order_of_names_and_of_memory():
    original = tree()
    reordered = {
        "scale": original["scale"],
        "layer": {
            "bias": original["layer"]["bias"],
            "kernel": np.asfortranarray(original["layer"]["kernel"]),
        },
    }
    assert list(reordered) != list(original)
    assert params_sha256(reordered) == params_sha256(original)


def test_hash_ignores_sharding():
    kernel = {"kernel": tree()["layer"]["kernel"]}
    one, eight = make_mesh({"data": 1}, jax.devices()[:1]), make_mesh({"data": 8})
    placements = [
        NamedSharding(one, PartitionSpec()),
        NamedSharding(eight, PartitionSpec()),
        NamedSharding(eight, PartitionSpec("data")),
    ]
    hashes = {params_sha256(jax.device_put(kernel, placement)) for placement in placements}
    assert hashes == {params_sha256(kernel)}


def test_path_name_joins_keys_and_indices():
    paths = jax.tree_util.tree_leaves_with_path({"a": {"b": [1, 2]}})
    assert [path_name(path) for path, _ in paths] == ["a/b/0", "a/b/1"]


def params():
    return {"head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}, "scale": 2.0}


def test_state_begins_at_step_zero():
    extra = {"pointer": jnp.asarray(4)}
    state = create_state(params(), optax.adam(1e-3), extra, seed=2**31 - 1)
    assert state.step.dtype == state.seed.dtype == jnp.int32
    assert (int(state.step), int(state.seed)) == (0, 2**31 - 1)
    assert state.momentum_params is state.teacher() is None
    assert state.extra is extra
    np.testing.assert_array_equal(state.params["head"]["kernel"], params()["head"]["kernel"])
    moments = state.opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(moments))


@pytest.mark.parametrize(
    "own", [{"head": {"bias": np.ones(3)}}, {"head": {"bias": np.ones(3)}, "scale": 5.0}, {}]
)
def test_a_teacher_is_the_student_but_for_what_it_has_of_its_own(own):
    teacher = create_state(params(), optax.sgd(1.0), None, 0, own).teacher()
    assert jax.tree.structure(teacher) == jax.tree.structure(params())
    np.testing.assert_array_equal(teacher["head"]["kernel"], params()["head"]["kernel"])
    np.testing.assert_array_equal(teacher["head"]["bias"], np.full(3, float("head" in own)))
    assert teacher["scale"] == own.get("scale", 2.0)


def test_part_of_a_tree():
    part = part_of(params(), {"head": {"kernel": None}, "scale": None})
    assert part.keys() == {"head", "scale"} and part["head"].keys() == {"kernel"}
    np.testing.assert_array_equal(part["head"]["kernel"], params()["head"]["kernel"])
    assert part["scale"] == 2.0
    assert part_of(params(), {}) == {}
