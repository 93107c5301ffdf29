"""Pictures with a box and the phrase it belongs to: transforms that keep all three true."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mplug_jax.data.transforms import horizontal_flip, square_resize

# Words that say where in the picture, or next to what, something is: a crop could make them wrong.
PLACE_WORDS = (
    "left|right|top|bottom|middle|mid|center|centre|central|upper|lower|upmost|above|below|under"
    "|corner|edge|border|side"
)
# "leftmost" and "left-hand" name a place, "bright" does not.
_ENDINGS = "most|hand|handed|wards?|side"
_PLACE = re.compile(rf"\b(?:{PLACE_WORDS})(?:{_ENDINGS})?\b", re.IGNORECASE)
_SIDE = re.compile(rf"\b(left|right)(?=(?:{_ENDINGS})?\b)", re.IGNORECASE)
_MIRRORED = {"left": "right", "right": "left"}
# Aspect ratios of crops, relative to the picture's, as in torchvision's RandomResizedCrop.
RATIO = (3 / 4, 4 / 3)
TRIES = 10


def names_place(phrase: str) -> bool:
    """Whether a phrase says where in the picture, or on which side of another, its object is."""
    return _PLACE.search(phrase) is not None


def mirrored_phrase(phrase: str) -> str:
    """The phrase for the mirrored picture: left and right (leftmost, right-hand) swapped."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        other = _MIRRORED[word.lower()]
        return other.upper() if word.isupper() else other.title() if word[0].isupper() else other

    return _SIDE.sub(swap, phrase)


def mirrored_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """The box of the mirrored picture: corners x1, y1, x2, y2 as fractions of the picture."""
    x1, y1, x2, y2 = box
    return 1.0 - x2, y1, 1.0 - x1, y2


def inside(box: Sequence[float]) -> tuple[float, float, float, float]:
    """What of a box, corners as fractions of the picture, lies within the picture."""
    x1, y1, x2, y2 = (float(min(max(corner, 0.0), 1.0)) for corner in box)
    return x1, y1, x2, y2


def crop_around(
    width: int,
    height: int,
    box: Sequence[float],
    rng: np.random.Generator,
    scale: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Left, top, width, height of a random crop that holds a box (corners in pixels).

    The crop's area is uniform in `scale` times the picture's, its aspect ratio log-uniform around
    the picture's, its place uniform; after `TRIES` draws too small for the box, or larger than the
    picture, it is the whole picture.
    """
    x1, y1 = math.floor(box[0]), math.floor(box[1])
    x2, y2 = math.ceil(box[2]), math.ceil(box[3])
    for _ in range(TRIES):
        side = math.sqrt(rng.uniform(*scale))
        stretch = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])) / 2)
        crop_width, crop_height = round(width * side * stretch), round(height * side / stretch)
        if max(1, x2 - x1) <= crop_width <= width and max(1, y2 - y1) <= crop_height <= height:
            left = rng.integers(max(0, x2 - crop_width), min(x1, width - crop_width) + 1)
            top = rng.integers(max(0, y2 - crop_height), min(y1, height - crop_height) + 1)
            return int(left), int(top), crop_width, crop_height
    return 0, 0, width, height


@dataclass(frozen=True)
class BoxTransform:
    """What happens to a picture with a box: `(pixels, box, phrase, rng) -> (pixels, box, phrase)`.

    Training follows the official grounding in kind: pictures at several scales, crops that keep
    the box, mirroring that swaps left and right in the phrase. The official code pads the picture
    to a square; here it is stretched to `size`, as at test time.

    Attributes:
      size: (height, width) of the result.
      train: False resizes and does nothing else; the other fields then have no effect.
      crop_scale: range of the crop's area as a fraction of the picture's (see `crop_around`);
        None, and phrases that name a place, take the whole picture.
      flip: mirror every other picture.
    """

    size: tuple[int, int]
    train: bool = False
    crop_scale: tuple[float, float] | None = None
    flip: bool = False

    def __call__(
        self,
        image: np.ndarray,
        box: Sequence[float],
        phrase: str,
        rng: np.random.Generator | None,
    ) -> tuple[np.ndarray, tuple[float, float, float, float], str]:
        """uint8 [h, w, 3] to uint8 [*size, 3]; boxes are x1, y1, x2, y2 as fractions of the picture
        and come back within 0..1; `rng` is used in training alone."""
        picture = Image.fromarray(image)
        x1, y1, x2, y2 = inside(box)
        if self.train and self.crop_scale is not None and not names_place(phrase):
            w, h = picture.size
            pixels = (x1 * w, y1 * h, x2 * w, y2 * h)
            left, top, width, height = crop_around(w, h, pixels, rng, self.crop_scale)
            picture = picture.crop((left, top, left + width, top + height))
            x1, x2 = (pixels[0] - left) / width, (pixels[2] - left) / width
            y1, y2 = (pixels[1] - top) / height, (pixels[3] - top) / height
        picture = square_resize(picture, self.size)
        if self.train and self.flip and rng.random() < 0.5:
            picture = horizontal_flip(picture)
            (x1, y1, x2, y2), phrase = mirrored_box((x1, y1, x2, y2)), mirrored_phrase(phrase)
        return np.asarray(picture), (x1, y1, x2, y2), phrase
