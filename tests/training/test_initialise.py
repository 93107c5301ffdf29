"""Fitting a checkpoint to a model with larger pictures, more tokens and another head."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mplug_jax.training.checkpoint import CheckpointError, load_params
from mplug_jax.training.initialise import plan, square_grid


def tree(grid: tuple[int, int], vocab: int, seed: int, **more: jax.Array) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "visual_encoder": {"position_embedding": draw(1 + grid[0] * grid[1], 3), "scale": draw(3)},
        "text_encoder": {"embeddings": {"word": {"embedding": draw(vocab, 4)}}},
        "mlm_head": {"bias": draw(vocab)},
        **more,
    }


@pytest.fixture
def saved(tmp_path):
    params = tree((2, 2), 5, 0)
    with ocp.StandardCheckpointer() as writer:
        writer.save((tmp_path / "checkpoints" / "7" / "state").absolute(), {"params": params})
    return tmp_path, params


def test_positions_are_resampled_vocabularies_grow_and_heads_stay_at_init(saved):
    folder, old = saved
    model = tree((2, 3), 8, 1, classifier={"kernel": jnp.ones((2, 2))})
    loaded, _, done = load_params(folder, model, (2, 3), optional=("^classifier/",))

    positions = np.asarray(old["visual_encoder"]["position_embedding"])
    grid = positions[1:].reshape(2, 2, 3)
    # Half-pixel centres: three columns read two at -1/6 (clamped), 1/2 and 7/6 (clamped).
    middle = grid.mean(axis=1)
    expected = np.stack([grid[:, 0], middle, grid[:, 1]], axis=1).reshape(6, 3)
    new = np.asarray(loaded["visual_encoder"]["position_embedding"])
    np.testing.assert_allclose(new, np.concatenate([positions[:1], expected]), rtol=1e-6)

    words = loaded["text_encoder"]["embeddings"]["word"]["embedding"]
    initial = model["text_encoder"]["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(words[:5], old["text_encoder"]["embeddings"]["word"]["embedding"])
    np.testing.assert_array_equal(words[5:], initial[5:])
    np.testing.assert_array_equal(loaded["mlm_head"]["bias"][:5], old["mlm_head"]["bias"])
    np.testing.assert_array_equal(loaded["visual_encoder"]["scale"], old["visual_encoder"]["scale"])
    np.testing.assert_array_equal(loaded["classifier"]["kernel"], 1.0)
    assert done.describe() == (
        "positions resampled: visual_encoder/position_embedding; vocabulary grown: mlm_head/bias, "
        "text_encoder/embeddings/word/embedding; at init: classifier/kernel"
    )


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (4, [[1.0, 2.0], [2.0, 4.0], [4.0, 8.0], [5.0, 10.0]]),  # linear, from centre to centre
        (2, [[1.0, 2.0], [5.0, 10.0]]),
    ],
)
def test_positions_of_frames_are_resampled(tmp_path, frames, expected):
    old = {"frame_positions": jnp.array([[1.0, 2.0], [5.0, 10.0]])}
    with ocp.StandardCheckpointer() as writer:
        writer.save((tmp_path / "checkpoints" / "7" / "state").absolute(), {"params": old})
    loaded, _, _ = load_params(tmp_path, {"frame_positions": jnp.zeros((frames, 2))}, (1, 1))
    np.testing.assert_allclose(loaded["frame_positions"], expected, rtol=1e-6)


def test_positions_of_frames_may_be_new_but_not_lost():
    """At zero they change nothing; without them a model that had them is another."""
    table = {"frame_positions": (4, 2)}
    assert plan({}, table, ()).fresh == ["frame_positions"]
    assert plan(table, {}, ("^classifier/",)).problems == [
        "  only in the checkpoint: frame_positions"
    ]


def test_a_head_that_the_model_lacks_or_shapes_otherwise_is_left(tmp_path):
    params = tree((2, 2), 5, 0, classifier={"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    with ocp.StandardCheckpointer() as writer:
        writer.save((tmp_path / "checkpoints" / "7" / "state").absolute(), {"params": params})
    model = tree((2, 2), 5, 1, classifier={"kernel": jnp.zeros((2, 3))})
    loaded, _, done = load_params(tmp_path, model, (2, 2), optional=("^classifier/",))
    np.testing.assert_array_equal(loaded["classifier"]["kernel"], 0.0)
    assert done.describe() == "at init: classifier/kernel; not taken: classifier/bias"


@pytest.mark.parametrize(
    ("grid", "vocab", "line"),
    [
        ((2, 2), 4, r"mlm_head/bias: \(5,\) in the checkpoint, \(4,\) in the model"),
        ((2, 2), 5, "only in the model: classifier/kernel"),
    ],
)
def test_other_differences_are_errors(saved, grid, vocab, line):
    more = {} if vocab == 4 else {"classifier": {"kernel": jnp.ones(1)}}
    with pytest.raises(CheckpointError, match=line):
        load_params(saved[0], tree(grid, vocab, 1, **more), grid)


def test_a_wider_model_is_a_problem_not_a_resize():
    old, new = {"visual_encoder/position_embedding": (5, 3)}, {}
    new["visual_encoder/position_embedding"] = (5, 4)
    assert plan(old, new, ()).problems == [
        "  visual_encoder/position_embedding: (5, 3) in the checkpoint, (5, 4) in the model"
    ]


def test_a_grid_that_is_no_square_must_be_known():
    assert square_grid(1 + 49) == (7, 7)
    with pytest.raises(ValueError, match="6 position embeddings"):
        square_grid(7)
