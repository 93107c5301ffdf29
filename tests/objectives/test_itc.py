"""Image-text contrast and its queue against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.itc import ITCQueue, enqueue, init_queue, itc_loss
from mplug_jax.training.sharding import batch_sharding, make_mesh, on_mesh

B, Q, E = 6, 10, 5
IDS = np.array([3, 8, 3, 5, 8, 9], np.int32)
VALID = np.array([True, True, True, False, False, True])


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_queue(rng):
    ids = np.array([3, -100, 5, 8, 9, 9, -100, 4, 11, 3], np.int32)
    return ITCQueue(unit(rng, Q, E), unit(rng, Q, E), ids, np.int32(0))


@pytest.fixture
def feats():
    """Online image, text, momentum image, text."""
    rng = np.random.default_rng(0)
    return [unit(rng, B, E) for _ in range(4)]


@pytest.fixture
def queue():
    return make_queue(np.random.default_rng(1))


def softmax(values):
    odds = [np.exp(v - max(values)) for v in values]
    return [o / sum(odds) for o in odds]


def reference(feats, queue, ids, valid, temperature, alpha, teacher_temperature=None):
    """(sum, count), one query at a time over a list of (features, id) candidates."""
    feats = [None if f is None else np.float64(f) for f in feats]
    teacher_temperature = teacher_temperature or temperature
    image, text, image_m, text_m = feats
    total = 0.0
    for queries, momentum_queries, others, past in (
        (image, image_m, text if text_m is None else text_m, None if queue is None else queue.text),
        (
            text,
            text_m,
            image if image_m is None else image_m,
            None if queue is None else queue.image,
        ),
    ):
        bank = [(others[j], ids[j]) for j in range(len(ids)) if valid[j]]
        if queue is not None:
            bank += [(np.float64(past[j]), queue.ids[j]) for j in range(len(past))]
        for i in range(len(ids)):
            if not valid[i]:
                continue
            probs = softmax([queries[i] @ f / temperature for f, _ in bank])
            hits = [float(candidate == ids[i]) for _, candidate in bank]
            target = [h / sum(hits) for h in hits]
            if momentum_queries is not None:
                wish = softmax([momentum_queries[i] @ f / teacher_temperature for f, _ in bank])
                target = [alpha * w + (1 - alpha) * t for w, t in zip(wish, target, strict=True)]
            total -= sum(t * np.log(p) for t, p in zip(target, probs, strict=True)) / 2
    return total, valid.sum()


CASES = {
    "queue, momentum, soft": (True, True, 0.4),
    "queue, momentum, hard": (True, True, 0.0),
    "momentum without queue": (False, True, 0.4),
    "online alone": (False, False, 0.0),
    "online with queue, alpha ignored": (True, False, 0.7),
}


def arrange(case, feats, queue):
    with_queue, with_momentum, alpha = CASES[case]
    chosen = [*feats[:2], *(feats[2:] if with_momentum else (None, None))]
    return chosen, (queue if with_queue else None), alpha


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("valid", [np.ones(B, bool), VALID], ids=["all", "some"])
def test_loss(case, valid, feats, queue):
    chosen, bank, alpha = arrange(case, feats, queue)
    want = reference(chosen, bank, IDS, valid, 0.07, alpha)
    for function in (itc_loss, jax.jit(itc_loss)):
        out = function(*chosen, bank, IDS, valid, 0.07, alpha)
        np.testing.assert_allclose(out.loss_sum, want[0], rtol=2e-5)
        assert out.count == want[1]
        assert out.loss_sum.dtype == out.count.dtype == jnp.float32


def test_returned_similarities_are_the_batch_block(feats, queue):
    image, text, image_m, text_m = feats
    out = itc_loss(*feats, queue, IDS, np.ones(B, bool), 0.5, 0.4)
    np.testing.assert_allclose(out.image_to_text, image @ text_m.T / 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.text_to_image, text @ image_m.T / 0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_finite_differences_of_the_reference(case, feats, queue):
    chosen, bank, alpha = arrange(case, feats, queue)
    temperature, step = 0.3, 1e-5

    def loss(image, text, temperature):
        rest = (*chosen[2:], bank, IDS, VALID, temperature, alpha)
        return itc_loss(image, text, *rest).loss_sum

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*chosen[:2], temperature)

    def slope(which, index):
        ends = []
        for sign in (1, -1):
            moved = [None if f is None else np.float64(f) for f in chosen]
            moved[which][index] += sign * step
            ends.append(reference(moved, bank, IDS, VALID, temperature, alpha)[0])
        return (ends[0] - ends[1]) / (2 * step)

    for which in (0, 1):
        for index in [(0, 0), (1, 3), (2, 4), (5, 2), (3, 1)]:
            np.testing.assert_allclose(grads[which][index], slope(which, index), atol=2e-5)
    # The soft targets are constants: only the online similarities see the temperature move.
    ends = [
        reference(chosen, bank, IDS, VALID, temperature + d, alpha, temperature)[0]
        for d in (step, -step)
    ]
    np.testing.assert_allclose(grads[2], (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def test_momentum_features_get_no_gradient(feats, queue):
    run = jax.grad(
        lambda a, b: itc_loss(*feats[:2], a, b, queue, IDS, VALID, 0.1, 0.4).loss_sum, (0, 1)
    )
    grads = jax.jit(run)(*feats[2:])
    assert not np.any(grads[0]) and not np.any(grads[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("garbage", [1e30, np.nan])
def test_invalid_rows_change_nothing(case, garbage, feats, queue):
    chosen, bank, alpha = arrange(case, feats, queue)
    dirty = [None if f is None else np.where(VALID[:, None], f, garbage) for f in chosen]
    dirty_ids = np.where(VALID, IDS, 3).astype(np.int32)

    def loss(image, text, rest, ids):
        return itc_loss(image, text, *rest, bank, ids, VALID, 0.07, alpha).loss_sum

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = run(*chosen[:2], chosen[2:], IDS)
    dirty_value, dirty_grads = run(*dirty[:2], dirty[2:], dirty_ids)
    assert value == dirty_value
    for grad, dirty_grad in zip(grads, dirty_grads, strict=True):
        np.testing.assert_array_equal(grad, dirty_grad)
        assert not np.any(grad[~VALID])


def test_no_valid_row_is_zero_and_finite(feats):
    nobody = np.zeros(B, bool)
    run = jax.value_and_grad(
        lambda x: itc_loss(x, *feats[1:], None, IDS, nobody, 0.07, 0.4).loss_sum
    )
    value, grad = jax.jit(run)(feats[0])
    assert value == 0 and not np.any(grad)


def test_small_temperature_stays_finite(feats, queue):
    run = jax.value_and_grad(
        lambda x, t: itc_loss(x, *feats[1:], queue, IDS, VALID, t, 0.4).loss_sum, (0, 1)
    )
    value, grads = jax.jit(run)(feats[0], 1e-5)
    assert np.isfinite(value) and np.all(np.isfinite(grads[0])) and np.isfinite(grads[1])


def test_one_momentum_feature_alone_is_refused(feats):
    with pytest.raises(ValueError, match="both"):
        itc_loss(*feats[:3], None, None, IDS, VALID, 0.07, 0.4)


def test_new_queue():
    queue = init_queue(jax.random.key(0), 32, E)
    for rows in (queue.image, queue.text):
        assert rows.shape == (32, E)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert np.any(queue.image != queue.text)
    assert np.all(queue.ids == -100) and queue.ids.dtype == jnp.int32
    assert queue.pointer == 0 and queue.pointer.dtype == jnp.int32


def replay(queue, batches):
    """A Python ring: valid rows one after the other."""
    image, text, ids = (np.array(x) for x in (queue.image, queue.text, queue.ids))
    place = int(queue.pointer)
    for image_feats, text_feats, batch_ids, valid in batches:
        for i in np.flatnonzero(valid):
            image[place], text[place], ids[place] = image_feats[i], text_feats[i], batch_ids[i]
            place = (place + 1) % len(ids)
    return image, text, ids, place


@pytest.mark.parametrize("size", [10, 12, 4], ids=["wraps", "multiple", "smaller than batch"])
@pytest.mark.parametrize("invalid", [False, True])
def test_queue_is_a_ring_of_valid_rows(size, invalid):
    rng = np.random.default_rng(4)
    start = init_queue(jax.random.key(1), size, E)
    batches = [
        (
            unit(rng, B, E),
            unit(rng, B, E),
            rng.integers(0, 99, B).astype(np.int32),
            rng.random(B) < 0.6 if invalid else np.ones(B, bool),
        )
        for _ in range(5)
    ]
    queue = start
    for batch in batches:
        # What an invalid row holds must not matter, a NaN included.
        hidden = [np.where(batch[3][:, None], f, np.nan) for f in batch[:2]]
        queue = jax.jit(enqueue)(queue, *hidden, *batch[2:])
    image, text, ids, place = replay(start, batches)
    np.testing.assert_array_equal(queue.image, image)
    np.testing.assert_array_equal(queue.text, text)
    np.testing.assert_array_equal(queue.ids, ids)
    assert queue.pointer == place
    assert jax.tree.map(jnp.dtype, queue) == jax.tree.map(jnp.dtype, start)


def test_all_valid_batches_follow_the_official_slices():
    rng = np.random.default_rng(5)
    size = 3 * B
    queue = init_queue(jax.random.key(2), size, E)
    image, ids, pointer = np.array(queue.image).T, np.array(queue.ids)[None], 0
    for _ in range(4):
        feats, batch_ids = unit(rng, B, E), rng.integers(0, 99, B).astype(np.int32)
        image[:, pointer : pointer + B] = feats.T
        ids[:, pointer : pointer + B] = batch_ids
        pointer = (pointer + B) % size
        queue = jax.jit(enqueue)(queue, feats, feats, batch_ids, np.ones(B, bool))
    np.testing.assert_array_equal(queue.image, image.T)
    np.testing.assert_array_equal(queue.ids, ids[0])
    assert queue.pointer == pointer


@pytest.mark.parametrize(("size", "momentum"), [(16, True), (10, True), (0, True), (0, False)])
def test_the_contrast_over_several_devices_is_that_of_one(size, momentum):
    """Rows are split over data and fsdp; a queue of ten is divided by neither."""
    rng = np.random.default_rng(4)
    feats = [unit(rng, 8, E) for _ in range(4 if momentum else 2)] + [None] * (0 if momentum else 2)
    ids, valid = np.array([1, 2, 3, 1, 4, 5, 6, 4], np.int32), np.arange(8) != 6
    queue = None
    if size:
        past = np.arange(size, dtype=np.int32)
        queue = ITCQueue(unit(rng, size, E), unit(rng, size, E), past, np.int32(size - 3))

    @jax.jit
    def contrast(image, text, image_m, text_m, queue, ids, valid):
        def loss(image, text):
            out = itc_loss(image, text, image_m, text_m, queue, ids, valid, 0.1, 0.4)
            return out.loss_sum, out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(image, text)
        after = None if queue is None else enqueue(queue, image_m, text_m, ids, valid)
        return out, grads, after

    expected = contrast(*feats, queue, ids, valid)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = batch_sharding(mesh)
    split = jax.device_put((*feats, ids, valid), rows)
    if size == 16:
        queue = queue.replace(**jax.device_put({"image": queue.image, "text": queue.text}, rows))
    with on_mesh(mesh):
        program = contrast.lower(*split[:4], queue, *split[4:]).compile()
    found = program(*split[:4], queue, *split[4:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)
    if size:
        assert f"f32[8,{8 + size}]" not in program.as_text()
