"""Perceptual hashes of pictures, and finding near ones among many."""

import itertools
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image

BITS = 64
# Grey levels between the darkest and the brightest of the cells below which there is nothing to
# compare: all plain pictures would be the same one.
_FLAT = 8


def difference_hash(pixels: np.ndarray) -> int | None:
    """64 bits that hardly change when a picture is resized or compressed again.

    The picture is averaged to 9 x 8 cells of grey; a bit says whether a cell is brighter than the
    one to its right (the "dHash" of N. Krawetz).

    Args:
      pixels: uint8 RGB [H, W, 3].

    Returns:
      None of a picture of one shade, which would be like any other such.
    """
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey).astype(int)
    if np.ptp(cells) < _FLAT:
        return None
    bits = (cells[:, :-1] > cells[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class HashIndex:
    """Hashes among which those near to another are found without looking at all of them.

    Two hashes that differ in at most `distance` bits agree in one of `distance + 1` bands of bits,
    so that only those of an equal band are compared.

    Args:
      hashes: of 64 bits.
      distance: bits that may differ, 0 to 16.

    Raises:
      ValueError: another distance.
    """

    def __init__(self, hashes: Iterable[int], distance: int):
        if not 0 <= distance <= 16:
            raise ValueError(f"a distance of hashes must lie in [0, 16], not {distance}")
        self.distance = distance
        bounds = np.linspace(0, BITS, distance + 2).astype(int).tolist()
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(bounds)]
        self._found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for value in set(hashes):
            for key in self._keys(value):
                self._found[key].append(value)

    def near(self, value: int) -> bool:
        """Whether a hash differs from one of these in at most `distance` bits."""
        return any(
            (value ^ other).bit_count() <= self.distance
            for key in self._keys(value)
            for other in self._found.get(key, ())
        )

    def _keys(self, value: int) -> list[tuple[int, int]]:
        return [(low, value >> low & mask) for low, mask in self._bands]
