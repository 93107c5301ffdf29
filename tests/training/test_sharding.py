"""Meshes, the placement of state and batches, and micro-batches, on eight CPU devices."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mplug_jax.training import sharding
from mplug_jax.training.sharding import (
    MeshError,
    abstract_batch,
    check_batch,
    make_mesh,
    place_global_batch,
    place_local_batch,
    split_micro_batches,
    state_shardings,
)
from mplug_jax.training.state import create_state


def rows_by_device(array):
    return {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


@pytest.mark.parametrize("size", [-1, 8])
def test_mesh_covers_all_devices_in_order(size):
    mesh = make_mesh({"data": size})
    assert dict(mesh.shape) == {"data": 8}
    assert list(mesh.devices.flat) == jax.devices()


def test_mesh_over_given_devices():
    mesh = make_mesh({"data": -1}, jax.devices()[2:5])
    assert list(mesh.devices.flat) == jax.devices()[2:5]


@pytest.mark.parametrize("shape", [{"data": 3}, {"data": 16}, {"data": 0}, {"data": -2}, {}])
def test_mesh_of_a_wrong_product_is_refused(shape):
    with pytest.raises(MeshError, match=f"{re.escape(str(shape))} does not match the 8 devices"):
        make_mesh(shape)


def test_mesh_with_an_unknown_axis_is_refused():
    with pytest.raises(MeshError, match=r"no axis 'modle'; axes are: data"):
        make_mesh({"data": 8, "modle": 1})


@pytest.mark.parametrize(("size", "accumulate"), [(12, 1), (3, 1), (40, 2), (1000, 3)])
def test_batch_that_does_not_divide_is_told_one_that_does(size, accumulate):
    mesh = make_mesh({"data": 8})
    with pytest.raises(MeshError, match=f"batch_size={size} ") as caught:
        check_batch(size, mesh, accumulate)
    parts, fitting = map(
        int, re.search(r"multiple of (\d+), such as (\d+)", str(caught.value)).groups()
    )
    assert parts == 8 * accumulate
    assert abs(fitting - size) < parts
    check_batch(fitting, mesh, accumulate)


def boxed_params():
    def box(shape, *names):
        return nn.LogicallyPartitioned(jnp.ones(shape), names)

    return {
        "up": {"kernel": box((4, 16), "embed", "mlp"), "bias": box((16,), "mlp")},
        # Ends in the path of another parameter of this shape, and is placed otherwise.
        "tower": {"up": {"kernel": box((4, 16), "embed", "embed_out")}},
        "scale": box((4,), "embed"),
    }


def make_state(boxed):
    extra = {"queue": jnp.zeros((16, 4)), "bias": jnp.zeros((8,))}
    params = nn.meta.unbox(boxed)
    return create_state(params, optax.adam(1e-3), extra, 0, jax.tree.map(jnp.copy, params))


def specs(boxed, mesh):
    abstract = jax.eval_shape(make_state, boxed)
    shardings = state_shardings(abstract, boxed, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    assert {s.mesh for s in jax.tree.leaves(shardings)} == {mesh}
    return jax.tree.map(
        lambda s, x: tuple(s.spec) + (None,) * (x.ndim - len(s.spec)), shardings, abstract
    )


def test_state_is_replicated_under_the_standard_rules():
    boxed = boxed_params()
    shardings = state_shardings(jax.eval_shape(make_state, boxed), boxed, make_mesh({"data": 8}))
    leaves = jax.tree.leaves(shardings)
    # Four parameters, as often in the teacher and both moments; step, seed, count, two of extra.
    assert len(leaves) == 4 * 4 + 5
    assert all(leaf.is_fully_replicated for leaf in leaves)


def test_optimizer_and_momentum_lie_as_their_parameters(monkeypatch):
    rules = tuple((axis, "data" if axis == "mlp" else to) for axis, to in sharding.RULES)
    monkeypatch.setattr(sharding, "RULES", rules)
    boxed, mesh = boxed_params(), make_mesh({"data": 8})
    found = specs(boxed, mesh)
    expected = {
        "up": {"kernel": (None, "data"), "bias": ("data",)},
        "tower": {"up": {"kernel": (None, None)}},
        "scale": (None,),
    }
    assert found.params == found.momentum_params == expected
    adam = found.opt_state[0]
    assert adam.mu == adam.nu == expected
    assert adam.count == found.step == found.seed == ()
    assert found.extra == {"queue": (None, None), "bias": (None,)}

    shardings = state_shardings(jax.eval_shape(make_state, boxed), boxed, mesh)
    state = jax.jit(make_state, out_shardings=shardings)(boxed)
    shard = state.opt_state[0].mu["up"]["kernel"].addressable_shards[0]
    assert shard.data.shape == (4, 2)


EXAMPLE = {
    "image": np.zeros((2, 2, 3), np.uint8),
    "mask": np.zeros((5,), bool),
    "image_id": np.int32(7),
}


def test_abstract_batch_has_the_shapes_and_placement_of_a_real_one():
    mesh = make_mesh({"data": 8})
    abstract = abstract_batch(EXAMPLE, 16, mesh)
    batch = {k: np.broadcast_to(v, (16, *v.shape)) for k, v in EXAMPLE.items()}
    placed = place_local_batch(batch, mesh)
    assert abstract.keys() == placed.keys()
    for name, value in placed.items():
        assert abstract[name].shape == value.shape
        assert abstract[name].dtype == value.dtype
        assert abstract[name].sharding == value.sharding


@pytest.mark.parametrize("place", [place_local_batch, place_global_batch])
def test_placed_batch_is_split_by_rows_and_comes_back(place):
    mesh = make_mesh({"data": 8})
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 2, 2, 3), dtype=np.uint8),
        "mask": rng.random((16, 5)) < 0.5,
        "image_id": rng.integers(0, 99, 16, dtype=np.int32),
    }
    placed = place(batch, mesh)
    for name, value in batch.items():
        assert placed[name].dtype == value.dtype
        np.testing.assert_array_equal(placed[name], value)
        rows = rows_by_device(placed[name])
        for index, device in enumerate(jax.devices()):
            np.testing.assert_array_equal(rows[device], value[2 * index : 2 * index + 2])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_keep_every_row_once_and_on_its_device(count):
    mesh = make_mesh({"data": 8})
    rows = np.arange(32 * 3).reshape(32, 3).astype(np.int32)
    placed = place_local_batch({"x": rows, "id": rows[:, 0]}, mesh)
    with jax.set_mesh(mesh):
        split = jax.jit(split_micro_batches, static_argnums=1)(placed, count)
    assert split["x"].shape == (count, 32 // count, 3)
    assert split["x"].sharding.spec == PartitionSpec(None, "data")
    np.testing.assert_array_equal(split["x"][..., 0], split["id"])
    assert sorted(np.asarray(split["id"]).ravel()) == sorted(rows[:, 0])
    before, after = rows_by_device(placed["id"]), rows_by_device(split["id"])
    for device in jax.devices():
        assert after[device].shape == (count, 32 // count // 8)
        assert sorted(after[device].ravel()) == sorted(before[device])
