"""Every layout and its inverse."""

import numpy as np
import pytest

from mplug_jax.conversion import layouts

# Their shape, ours with 3 heads.
SHAPES = {
    "AS_IS": ((5, 7), (5, 7)),
    "LINEAR": ((5, 7), (7, 5)),
    "SPLIT_HEADS": ((6, 7), (7, 3, 2)),
    "SPLIT_HEADS_BIAS": ((6,), (3, 2)),
    "MERGE_HEADS": ((7, 6), (3, 2, 7)),
    "CONVOLUTION": ((5, 3, 2, 4), (2, 4, 3, 5)),
    "BATCH_OF_ONE": ((1, 5, 7), (5, 7)),
    "TOKEN": ((1, 1, 7), (7,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_layout_is_undone_exactly(name):
    layout: layouts.Layout = getattr(layouts, name)
    theirs, ours = SHAPES[name]
    array = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    loaded = layout.load(array, 3)
    assert loaded.shape == ours
    np.testing.assert_array_equal(layout.store(loaded, 3), array)


def test_every_layout_is_tried():
    assert {n for n, v in vars(layouts).items() if isinstance(v, layouts.Layout)} == set(SHAPES)
