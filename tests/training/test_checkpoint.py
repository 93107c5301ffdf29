"""Checkpoints: bitwise restores, what is kept, and what a user is told."""

from __future__ import annotations

import gc
import json
import math
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.training import checkpoint as checkpoint_lib
from mplug_jax.training.checkpoint import (
    CheckpointError,
    WholeCheckpoints,
    find_checkpoint,
    load_params,
    read_params,
    save_params,
    saved_config,
)
from mplug_jax.training.integrity import damages
from mplug_jax.training.orbax_settings import LEAST_PART
from mplug_jax.training.sharding import make_mesh, replicated, state_shardings
from tests.training.small_pretraining import pretrain_start, small_config, write_vocabulary
from tests.training.small_states import (
    BEST,
    SETTINGS,
    abstract,
    assert_same_bits,
    content,
    iterator,
    kept,
    make_state,
    opened,
    params,
    write,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A workdir with one checkpoint, of step 3."""
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, params())
    (workdir / "config.json").write_text(json.dumps({"seed": 9}))
    return workdir


def test_restores_every_bit_and_the_place_in_the_data(tmp_path):
    state, data = make_state(params(), 7), iterator()
    for _ in range(9):  # beyond the first epoch
        next(data)
    with opened(tmp_path, SETTINGS) as checkpointer:
        checkpointer.save(7, state, data, {})
        following = next(data)  # drawn after the save: not part of it
    fresh = iterator()
    with opened(tmp_path, SETTINGS) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.restore(7, abstract(state), fresh)
    assert_same_bits(restored, state)
    batch = next(fresh)
    assert all(np.array_equal(batch[name], following[name]) for name in following)
    assert not np.array_equal(batch["draw"], next(iterator())["draw"])


def test_a_teacher_that_lacks_what_never_moves_is_saved_so(tmp_path):
    state = make_state(params(), 2)
    state = state.replace(momentum_params={"head": {"bias": state.params["head"]["bias"] * 2}})
    with opened(tmp_path, SETTINGS) as checkpointer:
        checkpointer.save(2, state, iterator(), {})
    with ocp.StandardCheckpointer() as reader:
        saved = reader.metadata(tmp_path / "checkpoints" / "2" / "state").item_metadata.tree
    assert jax.tree.map(lambda x: x.shape, saved["momentum_params"]) == {"head": {"bias": (5,)}}
    with opened(tmp_path, SETTINGS) as checkpointer:
        assert_same_bits(checkpointer.restore(2, abstract(state), iterator()), state)


def test_restores_in_the_shardings_asked_for(run):
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = make_state(params(), 3)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), state)
    with opened(run, SETTINGS) as checkpointer:
        restored = checkpointer.restore(3, wanted, iterator())
    assert_same_bits(restored, state)
    assert all(leaf.sharding == split for leaf in jax.tree.leaves(restored))


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [
        [{"data": 8}, {"data": 4}, {"data": 2}, {"data": 1}, {"data": 2, "fsdp": 4}],
        [{"fsdp": 8}, {"tensor": 2}, {"fsdp": 4, "tensor": 2}],
    ],
    ids=["fewer_devices", "other_axes"],
)
def test_what_one_mesh_has_saved_another_restores(tmp_path, meshes):
    """State and place in the data, bit by bit, from mesh to mesh."""
    task = Pretrain(small_config(write_vocabulary(tmp_path)), str(tmp_path))
    _, boxed, state = pretrain_start(task)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.ndim else x,
        state.replace(step=jnp.int32(5)),
    )

    def placed(shape):
        mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
        return state_shardings(state, boxed, mesh)

    moving, data = jax.device_put(state, placed(meshes[0])), iterator()
    data.set_state({**data.get_state(), "next_batch": 5})
    for step, shape in enumerate(meshes[1:], start=5):
        with opened(tmp_path, SETTINGS) as checkpointer:
            checkpointer.save(step, moving, data, {})
        shardings = placed(shape)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        data = iterator()
        with opened(tmp_path, SETTINGS) as checkpointer:
            moving = checkpointer.restore(step, wanted, data)
        assert_same_bits(moving, state)
        assert jax.tree.map(lambda x: x.sharding, moving) == shardings
        moments = jax.tree.leaves(moving.opt_state)
        assert any(not x.is_fully_replicated for x in moments) == (set(shape) != {"data"})
        assert data.get_state()["next_batch"] == 5


def test_no_checkpoint_has_no_latest_step(tmp_path):
    with opened(tmp_path, SETTINGS) as checkpointer:
        assert checkpointer.latest_step() is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {2, 4, 5}),  # 2 is the best
        ({"best_mode": "min"}, {1, 4, 5}),
        ({"keep_last": 1}, {2, 5}),
        ({"best_metric": ""}, {4, 5}),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, changes, expected):
    settings = BEST | changes
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: None, 5: 0.3}  # step 4 was not evaluated
    state, data = make_state(params()), iterator()
    with opened(tmp_path, settings) as checkpointer:
        for step, score in scores.items():
            metrics = {} if score is None else {"retrieval/r_mean": score, "caption/words": 1.0}
            checkpointer.save(step, state, data, metrics)
            checkpointer.wait()
            assert step in kept(tmp_path)  # the newest is never deleted, however bad
    assert kept(tmp_path) == expected


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_that_is_waited_for_is_complete_when_it_returns(tmp_path, monkeypatch, wait):
    done, write = threading.Event(), checkpoint_lib.write_checksums

    def slow_disk(folder):
        # Released by a timer if the save is waited for, else by the test itself.
        assert done.wait(timeout=60)
        write(folder)

    monkeypatch.setattr(checkpoint_lib, "write_checksums", slow_disk)
    with opened(tmp_path, SETTINGS | {"wait": wait}) as checkpointer:
        if wait:
            threading.Timer(0.5, done.set).start()
        checkpointer.save(4, make_state(params()), iterator(), {})
        assert done.is_set() == wait
        assert kept(tmp_path) == ({4} if wait else set())
        assert (tmp_path / "checkpoints/4/checksums.json").exists() == wait
        done.set()
    assert kept(tmp_path) == {4}


def test_what_is_kept_is_remembered_by_a_resumed_run(tmp_path):
    state, data = make_state(params()), iterator()
    settings = BEST | {"keep_last": 1}
    for step, score in {1: 0.9, 2: 0.5, 3: 0.4}.items():
        with opened(tmp_path, settings) as checkpointer:
            checkpointer.save(step, state, data, {"retrieval/r_mean": score})
    assert kept(tmp_path) == {1, 3}


def test_a_resumed_run_may_ask_for_another_best(tmp_path):
    state, data = make_state(params()), iterator()
    for step, metric in {1: "retrieval/r_mean", 2: "caption/words", 3: "caption/words"}.items():
        settings = BEST | {"keep_last": 1, "best_metric": metric}
        with opened(tmp_path, settings) as checkpointer:
            checkpointer.save(step, state, data, {metric: 9.0 / step})
    assert kept(tmp_path) == {2, 3}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_saves_without_metrics_though_a_best_is_wanted(tmp_path, caplog, mode):
    state, data = make_state(params()), iterator()
    settings = BEST | {"best_mode": mode}
    with opened(tmp_path, settings) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, data, {})
    assert kept(tmp_path) == {2, 3}
    with opened(tmp_path, settings) as checkpointer:
        for step, metrics in {4: {"retrieval/r_mean": 0.1}, 5: {}, 6: {}, 7: {}}.items():
            checkpointer.save(step, state, data, metrics)
    assert kept(tmp_path) == {4, 6, 7}
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_metrics_without_the_best_one_are_refused(tmp_path):
    with (
        opened(tmp_path, BEST) as checkpointer,
        pytest.raises(CheckpointError, match=r"'retrieval/r_mean' is none of .*caption/words"),
    ):
        checkpointer.save(1, make_state(params()), iterator(), {"caption/words": 2.0})


# Orbax leaves its other reads unfinished when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "change", ["shape", "new parameter", "lost parameter", "no teacher", "other rules"]
)
def test_restoring_another_model_names_the_folder(run, change):
    tree = params(4 if change == "shape" else 3)
    if change == "new parameter":
        tree["bridge"] = jnp.zeros(2)
    if change == "lost parameter":
        del tree["temperature"]
    state = make_state(tree)
    if change == "no teacher":
        state = state.replace(momentum_params=None)
    if change == "other rules":
        state = state.replace(momentum_params={"temperature": jnp.ones(())})
    with opened(run, SETTINGS) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore(3, abstract(state), iterator())
    assert str(run / "checkpoints") in str(error.value)
    assert "step 3" in str(error.value)
    assert "init_from" in str(error.value)
    del error
    gc.collect()  # lets go of those reads here, not in whatever test comes later


def test_loads_parameters_alone(run):
    loaded, folder, done = load_params(run, abstract(params()), (1, 1))
    assert_same_bits(loaded, params())
    assert folder == run / "checkpoints" / "3"
    assert done.describe() == ""


def test_only_large_arrays_are_cut_among_the_devices_that_hold_them(tmp_path, monkeypatch):
    cut, cuts = jax.lax.slice_in_dim, []

    def counted(array: jax.Array, *args, **kwargs) -> jax.Array:
        cuts.append(array.shape)
        return cut(array, *args, **kwargs)

    monkeypatch.setattr(jax.lax, "slice_in_dim", counted)
    whole = replicated(make_mesh({"data": -1}, jax.devices()[:4]))
    rng = np.random.default_rng(0)
    sizes = {"small": (64, 64), "large": (4 * LEAST_PART // 4, 1)}
    saved = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    save_params(tmp_path, jax.device_put(saved, whole))
    assert cuts == 4 * [sizes["large"]]
    assert_same_bits(read_params(tmp_path)[0], saved)


def test_loads_one_part_of_the_parameters(run):
    head = {"head": params()["head"]}
    loaded, _, _ = load_params(run, abstract(head), (1, 1), part="head")
    assert_same_bits(loaded, head)


def test_parameters_that_differ_are_all_listed(run):
    other = {"head": {"kernel": jnp.zeros((5, 4)), "scale": jnp.zeros(2)}, "bridge": jnp.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_params(run, abstract(other), (1, 1))
    first, *lines = str(error.value).splitlines()
    assert str(run / "checkpoints" / "3") in first
    assert [line.strip() for line in lines] == [
        "only in the checkpoint: head/bias",
        "only in the checkpoint: temperature",
        "only in the model: bridge",
        "only in the model: head/scale",
        "head/kernel: (5, 3) in the checkpoint, (5, 4) in the model",
    ]


def test_parameters_alone_are_a_checkpoint(tmp_path):
    tree = params()
    tree["head"]["ids"] = np.arange(3, dtype=np.float32)  # of NumPy, too
    folder = save_params(tmp_path / "new" / "run", tree)
    assert folder == tmp_path / "new" / "run" / "checkpoints" / "0"
    loaded, found, _ = load_params(tmp_path / "new" / "run", abstract(jax.device_put(tree)), (1, 1))
    assert found == folder
    assert_same_bits(loaded, tree)
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        save_params(tmp_path / "new" / "run", tree)


def test_parameters_are_read_without_knowing_the_model(run):
    read, folder = read_params(run)
    assert folder == run / "checkpoints" / "3"
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(read))
    assert_same_bits(read, params())


def test_a_checkpoint_without_readable_parameters(tmp_path):
    (tmp_path / "checkpoints" / "4" / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"checkpoints/4 holds no readable parameters"):
        load_params(tmp_path, abstract(params()), (1, 1))


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/3"])
def test_finds_a_checkpoint_by_any_of_its_folders(run, part):
    assert find_checkpoint(run / part) == run / "checkpoints" / "3"
    assert find_checkpoint(str(run / part)) == run / "checkpoints" / "3"
    assert saved_config(run / part) == {"seed": 9}


def test_finds_the_newest_by_number(tmp_path):
    for name in ("900", "1000", "1100.orbax-checkpoint-tmp-0"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint(tmp_path).name == "1000"


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_checkpoint_there(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(tmp_path / name)
    assert f"config.init_from={tmp_path / name}: no checkpoint there" in str(error.value)
    assert "workdir" in str(error.value)
    with pytest.raises(CheckpointError, match=rf"^--from={tmp_path / name}: no checkpoint there"):
        find_checkpoint(tmp_path / name, "--from")


def test_a_checkpoint_without_a_config(tmp_path):
    (tmp_path / "checkpoints" / "1" / "state").mkdir(parents=True)
    assert saved_config(tmp_path) is None


def test_a_checkpoint_of_a_run_that_is_to_end_is_the_newest_and_leaves_the_best(tmp_path, caplog):
    settings = BEST | {"keep_last": 1}
    with opened(tmp_path, settings) as checkpointer:
        for step, value in ((1, 5.0), (2, 3.0)):
            metrics = {"retrieval/r_mean": value}
            checkpointer.save(step, make_state(params(), step), iterator(), metrics)
        assert checkpointer.complete(3, make_state(params(), 3), iterator())
        # Complete when it comes back, not only begun; and not saved twice.
        assert damages(tmp_path / "checkpoints" / "3") == []
        assert not checkpointer.complete(3, make_state(params(), 3), iterator())
    assert kept(tmp_path) == {1, 3}
    with opened(tmp_path, settings) as checkpointer:
        checkpointer.save(4, make_state(params(), 4), iterator(), {})
    assert kept(tmp_path) == {1, 4}
    assert caplog.records == []


def test_whole_checkpoints_up_to_a_step_are_read_and_nothing_is_changed(tmp_path):
    for step in (1, 2, 4):
        write(tmp_path, params(), step)
    root = tmp_path / "checkpoints"
    (root / "2" / "state" / "_METADATA").write_text("")
    (root / "5.orbax-checkpoint-tmp").mkdir()
    before = content(tmp_path)
    # The settings keep two.
    assert [WholeCheckpoints(tmp_path, most).latest_step() for most in (4, 3, 1)] == [4, None, None]
    restored = WholeCheckpoints(tmp_path, 4).restore(4, abstract(make_state(params())), iterator())
    assert_same_bits(restored, make_state(params(), 4))
    assert content(tmp_path) == before
    assert (root / "5.orbax-checkpoint-tmp").exists()
