"""Classification loss and hits against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.objectives.classification import classification_hits, classification_loss

LABELS = np.array([0, 2, 1, 1, 2], np.int32)
VALID = np.array([True, True, False, True, False])

run = jax.jit(jax.value_and_grad(classification_loss, has_aux=True))


@pytest.fixture
def logits():
    # The largest: 1, 2, 1, 0, 2.
    rows = [[1, 4, 0], [2, 1, 3], [0, 9, 1], [5, 4, 4], [0, 0, 7]]
    return np.array(rows, np.float32) / 2


def test_loss_and_hits(logits):
    odds = np.exp(np.float64(logits))
    want = sum(-np.log(odds[i, LABELS[i]] / odds[i].sum()) for i in range(5) if VALID[i])
    (loss_sum, count), _ = run(logits, LABELS, VALID)
    np.testing.assert_allclose(loss_sum, want, rtol=1e-5)
    assert count == 3 and loss_sum.dtype == jnp.float32
    hits, count = classification_hits(logits, LABELS, VALID)
    assert (hits, count) == (1, 3)


def test_invalid_rows_change_nothing(logits):
    dirty = np.where(VALID[:, None], logits, np.nan)
    clean = run(logits, LABELS, VALID)
    jax.tree.map(np.testing.assert_array_equal, clean, run(dirty, LABELS, VALID))
    assert classification_hits(dirty, LABELS, VALID) == (1, 3)
