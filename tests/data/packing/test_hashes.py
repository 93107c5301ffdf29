"""Perceptual hashes, and the search for near ones against comparing all."""

import io

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.packing.hashes import HashIndex, difference_hash


def picture(seed: int, size=(200, 300)) -> np.ndarray:
    cells = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize(size[::-1], Image.Resampling.BICUBIC))


def test_bits_say_where_it_gets_darker():
    steps = np.repeat(np.array([0, 20, 40, 30, 60, 50, 70, 80, 90], np.uint8), 10)
    pixels = np.broadcast_to(steps[None, :, None], (80, 90, 3))
    row = 0b00101000  # from the third to the fourth cell, and from the fifth to the sixth
    assert difference_hash(pixels) == int.from_bytes(bytes([row] * 8), "big")


def test_resizing_and_compression_change_few_bits_and_other_pictures_many():
    hashes = []
    for seed in range(10):
        whole = Image.fromarray(picture(seed))
        file = io.BytesIO()
        whole.resize((120, 80), Image.Resampling.BICUBIC).save(file, "JPEG", quality=60)
        again = np.asarray(Image.open(file))
        first, second = difference_hash(np.asarray(whole)), difference_hash(again)
        assert (first ^ second).bit_count() <= 2
        hashes.append(first)
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 10


def test_pictures_of_one_shade_have_none():
    assert difference_hash(np.full((50, 40, 3), 120, np.uint8)) is None


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 16])
def test_index_finds_what_comparing_all_finds(distance):
    rng = np.random.default_rng(distance)
    known = [int(x) for x in rng.integers(0, 2**63, 40)]
    index = HashIndex(known, distance)
    for flips in range(0, distance + 4):
        for value in known[:10]:
            bits = rng.choice(64, flips, replace=False)
            asked = value ^ sum(1 << int(bit) for bit in bits)
            expected = min((asked ^ other).bit_count() for other in known) <= distance
            assert index.near(asked) == expected == (flips <= distance)
    assert not HashIndex([], distance).near(5)


def test_impossible_distances_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 16\], not 17"):
        HashIndex([], 17)
