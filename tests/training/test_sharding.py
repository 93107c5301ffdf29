"""Meshes, the placement of state and batches, and micro-batches, on eight CPU devices."""

import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mplug_jax.models.axes import axis_rules, constrain, shards
from mplug_jax.models.config import preset
from mplug_jax.models.mplug import init_params
from mplug_jax.training.sharding import (
    MeshError,
    abstract_batch,
    check_batch,
    data_mesh,
    make_mesh,
    on_mesh,
    parameter_spec,
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
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"data": -1, "fsdp": 4, "tensor": 1}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_axes_share_the_devices_the_tensor_axis_among_neighbours(shape, sizes):
    mesh = make_mesh(shape)
    assert tuple(mesh.shape.values()) == mesh.devices.shape == sizes
    assert list(mesh.devices.flat) == jax.devices()


def test_a_tensor_axis_across_processes_is_refused():
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(MeshError, match=r"mesh\.tensor=8 .*several processes"):
        make_mesh({"tensor": 8}, devices)


def test_mesh_over_given_devices():
    for mesh in (make_mesh({"data": -1}, jax.devices()[2:5]), data_mesh(jax.devices()[2:5])):
        assert list(mesh.devices.flat) == jax.devices()[2:5]
        assert mesh.shape["data"] == 3


@pytest.mark.parametrize(
    "shape",
    [
        *({"data": 3}, {"data": 16}, {"data": 0}, {"data": -2}, {}),
        *({"data": -1, "fsdp": 3}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}),
    ],
)
def test_mesh_of_a_wrong_product_is_refused(shape):
    with pytest.raises(MeshError, match=f"{re.escape(str(shape))} does not match the 8 devices"):
        make_mesh(shape)


def test_mesh_with_an_unknown_axis_is_refused():
    with pytest.raises(MeshError, match=r"no axis 'modle'; axes are: data, fsdp, tensor"):
        make_mesh({"data": 8, "modle": 1})


@pytest.mark.parametrize(("size", "accumulate"), [(12, 1), (3, 1), (40, 2), (1000, 3)])
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_batch_that_does_not_divide_is_told_one_that_does(size, accumulate, shape):
    mesh = make_mesh(shape)
    axes = f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
    with pytest.raises(MeshError, match=f"batch_size={size} .* mesh axes {axes} ") as caught:
        check_batch(size, mesh, accumulate)
    parts, fitting = map(
        int, re.search(r"multiple of (\d+), such as (\d+)", str(caught.value)).groups()
    )
    assert parts == 8 * accumulate
    assert abs(fitting - size) < parts
    check_batch(fitting, mesh, accumulate)


def test_tensor_neighbours_share_their_rows():
    check_batch(2, make_mesh({"data": 2, "tensor": 4}), 1)


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


def test_state_is_replicated_over_the_data_axis_but_for_the_queue():
    boxed = boxed_params()
    shardings = state_shardings(jax.eval_shape(make_state, boxed), boxed, make_mesh({"data": 8}))
    leaves = jax.tree.leaves(shardings)
    # Four parameters, as often in the teacher and both moments; step, seed, count, two of extra.
    assert len(leaves) == 4 * 4 + 5
    assert [leaf.is_fully_replicated for leaf in leaves].count(False) == 2
    assert {s.spec for s in jax.tree.leaves(shardings.extra)} == {PartitionSpec(("data", "fsdp"))}


def test_optimizer_and_momentum_lie_as_their_parameters():
    boxed, mesh = boxed_params(), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    found = specs(boxed, mesh)
    rows = ("data", "fsdp")
    expected = {
        "up": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)},
        "tower": {"up": {"kernel": ("fsdp", None)}},
        "scale": ("fsdp",),
    }
    assert found.params == found.momentum_params == expected
    adam = found.opt_state[0]
    assert adam.mu == adam.nu == expected
    assert adam.count == found.step == found.seed == ()
    assert found.extra == {"queue": (rows, None), "bias": (rows,)}

    shardings = state_shardings(jax.eval_shape(make_state, boxed), boxed, mesh)
    state = jax.jit(make_state, out_shardings=shardings)(boxed)
    shard = state.opt_state[0].mu["up"]["kernel"].addressable_shards[0]
    assert shard.data.shape == (2, 8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 6), (("data", "fsdp"), None)),
        ((6, 16), (None, ("data", "fsdp"))),
        ((6, 6), (None,) * 2),
    ],
)
def test_a_queue_is_split_along_the_first_axis_that_divides(shape, expected):
    boxed = boxed_params()
    state = jax.eval_shape(make_state, boxed).replace(
        extra={"queue": jax.ShapeDtypeStruct(shape, jnp.float32)}
    )
    spec = state_shardings(state, boxed, make_mesh({"data": 4, "fsdp": 2})).extra["queue"].spec
    assert tuple(spec) + (None,) * (2 - len(spec)) == expected


FSDP4 = {"fsdp": 4, "tensor": 2}
TENSOR8 = {"tensor": 8}


@pytest.mark.parametrize(
    ("mesh", "shape", "axes", "expected"),
    [
        (FSDP4, (3, 8, 2, 5), ("layers", "embed", "heads", "kv"), (None, "fsdp", "tensor", None)),
        (FSDP4, (3, 8), ("layers", "embed"), (None, "fsdp")),
        # Vectors that do not divide are held whole, layers stacked or not.
        (FSDP4, (3, 6), ("layers", "embed"), (None, None)),
        (FSDP4, (7,), ("mlp",), (None,)),
        # What the published models have: 12 heads and 30,522 words.
        (TENSOR8, (768, 12, 64), ("embed", "heads", "kv"), (("fsdp", "tensor"), None, None)),
        (TENSOR8, (12, 64), ("heads", "kv"), (None, None)),
        (TENSOR8, (30522, 768), ("vocab", "embed"), (None, ("fsdp", "tensor"))),
        (FSDP4, (30522, 768), ("vocab", "embed"), ("tensor", "fsdp")),
        (TENSOR8, (30522,), ("vocab",), (None,)),
    ],
)
def test_parameters_are_split_as_far_as_they_divide(mesh, shape, axes, expected):
    assert tuple(parameter_spec("w", shape, axes, make_mesh(mesh))) == expected


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("shape", [{"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 8}])
def test_published_models_fit_meshes_of_eight(size, shape):
    """An eighth of the parameters a device, but for vectors, and what the tensor axis leaves."""
    mesh = make_mesh(shape)
    boxed = jax.eval_shape(lambda rng: init_params(preset(size), rng), jax.random.key(0))
    params = nn.meta.unbox(boxed)
    shardings = state_shardings(params, boxed, mesh)
    whole = sum(x.size for x in jax.tree.leaves(params))
    held = sum(
        int(np.prod(s.shard_shape(x.shape)))
        for s, x in zip(jax.tree.leaves(shardings), jax.tree.leaves(params), strict=True)
    )
    assert 1 / 8 <= held / whole < 0.135


@pytest.mark.parametrize(
    ("shape", "axes", "said"),
    [
        (
            (6, 16),
            ("embed", "mlp"),
            r"mesh\.fsdp=4 does not divide its axis 'embed' of 6\..*1, 2, 3, "
            r"6, .* multiple of 4, such as 8\.",
        ),
        ((8, 15), ("embed", "mlp"), r"mesh\.tensor=2 does not divide its axis 'mlp' of 15\."),
        (
            (4, 3, 5),
            ("embed", "heads", "kv"),
            r"mesh\.fsdp=4 x config\.mesh\.tensor=2 does not "
            r"divide its axis 'embed' of 4\..*such as 8\.",
        ),
        ((8, 8), ("embed", "embed"), r"'embed' and 'embed' are both split over mesh axis 'fsdp'"),
        ((8, 8), ("mlp", "heads"), r"'mlp' and 'heads' are both split over mesh axis 'tensor'"),
        ((8, 8), ("embed", "experts"), r"logical axis 'experts' has no rule.*: embed, "),
    ],
)
def test_parameters_that_cannot_be_placed_are_named(shape, axes, said):
    boxed = {"tower": {"up": {"kernel": nn.LogicallyPartitioned(jnp.ones(shape), axes)}}}
    with pytest.raises(MeshError, match=f"^tower/up/kernel: .*{said}"):
        state_shardings(jax.eval_shape(make_state, boxed), boxed, make_mesh(FSDP4))


def test_activations_are_laid_out_by_the_rules_alone():
    x = jnp.arange(8 * 6 * 4.0).reshape(8, 6, 4)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    @jax.jit
    def laid_out(x):
        return constrain(x, "batch", "heads", None)

    with on_mesh(mesh):
        assert (shards("bank"), shards("heads"), shards("embed_out")) == (4, 2, 1)
        y = laid_out(x)
    np.testing.assert_array_equal(y, x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 4)}
    assert shards("bank") == 1
    assert constrain(x, "batch", None, None) is x
    with jax.set_mesh(mesh), axis_rules({"batch": None}):
        assert constrain(x, "batch", None, None) is x


def test_what_does_not_divide_is_left_to_the_compiler():
    with on_mesh(make_mesh({"data": 2, "tensor": 4})):
        y = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.ones((6, 6)))
    assert {shard.data.shape[0] for shard in y.addressable_shards} == {3}


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


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_keep_every_row_once_and_on_its_device(count, shape):
    mesh = make_mesh(shape)
    rows = np.arange(32 * 3).reshape(32, 3).astype(np.int32)
    placed = place_local_batch({"x": rows, "id": rows[:, 0]}, mesh)
    with jax.set_mesh(mesh):
        split = jax.jit(split_micro_batches, static_argnums=1)(placed, count)
    assert split["x"].shape == (count, 32 // count, 3)
    assert split["x"].sharding.shard_shape(split["x"].shape) == (count, 4 // count, 3)
    np.testing.assert_array_equal(split["x"][..., 0], split["id"])
    assert sorted(np.asarray(split["id"]).ravel()) == sorted(rows[:, 0])
    before, after = rows_by_device(placed["id"]), rows_by_device(split["id"])
    for device in jax.devices():
        assert after[device].shape == (count, 32 // count // 8)
        assert sorted(after[device].ravel()) == sorted(before[device])
