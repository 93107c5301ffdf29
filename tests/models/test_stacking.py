"""Rows stacked part by part, and taken apart again."""

import jax
import numpy as np
import pytest

from mplug_jax.models.stacking import join_parts, split_parts

FIRST, SECOND, NONE = np.arange(4), np.arange(10, 16), np.arange(0)


def test_each_part_has_its_rows_of_every_array():
    joined = join_parts([FIRST, SECOND, NONE], 2)
    np.testing.assert_array_equal(joined, [0, 1, 10, 11, 12, 2, 3, 13, 14, 15])


def test_one_part_is_concatenation():
    joined = join_parts([FIRST, SECOND], 1)
    np.testing.assert_array_equal(joined, np.concatenate([FIRST, SECOND]))


@pytest.mark.parametrize("parts", [1, 2])
def test_splitting_undoes_joining(parts):
    arrays = [np.random.default_rng(i).normal(size=(n, 3)) for i, n in enumerate((4, 0, 6))]
    arrays = [x.astype(np.float32) for x in arrays]
    apart = jax.jit(lambda: split_parts(join_parts(arrays, parts), [4, 0, 6], parts))()
    for got, want in zip(apart, arrays, strict=True):
        np.testing.assert_array_equal(got, want)
