"""Bucketed shapes."""

import numpy as np
import pytest

from mplug_jax.generation.bucketing import bucket_size, pad_rows, trim_texts


def test_the_smallest_size_that_fits_is_taken():
    assert [bucket_size(n, (16, 4, 8)) for n in (1, 4, 5, 16)] == [4, 4, 8, 16]
    with pytest.raises(ValueError, match=r"17 fit none of the sizes \[4, 8, 16\]"):
        bucket_size(17, (16, 4, 8))


@pytest.mark.parametrize(("longest", "length"), [(1, 2), (2, 2), (3, 4), (5, 6)])
def test_texts_lose_padding_only(longest, length):
    ids = np.arange(1, 13).reshape(2, 6)
    mask = np.arange(6) < np.array([[1], [longest]])
    ids = np.where(mask, ids, 0)
    cut, cut_mask = trim_texts(ids, mask, (2, 4, 100))
    assert cut.shape == cut_mask.shape == (2, length)
    np.testing.assert_array_equal(np.pad(cut, ((0, 0), (0, 6 - length))), ids)
    np.testing.assert_array_equal(np.pad(cut_mask, ((0, 0), (0, 6 - length))), mask)


def test_rows_are_filled_with_the_last_one():
    batch = {"ids": np.array([[1, 2], [3, 4], [5, 6]]), "index": np.array([7, 8, 9])}
    padded, valid = pad_rows(batch, (2, 5))
    np.testing.assert_array_equal(padded["ids"], [[1, 2], [3, 4], [5, 6], [5, 6], [5, 6]])
    np.testing.assert_array_equal(padded["index"], [7, 8, 9, 9, 9])
    np.testing.assert_array_equal(valid, [True, True, True, False, False])
    for wrong in ({"a": np.zeros((0, 2))}, {"a": np.zeros(2), "b": np.zeros(3)}):
        with pytest.raises(ValueError, match="as many rows"):
            pad_rows(wrong, (4,))
