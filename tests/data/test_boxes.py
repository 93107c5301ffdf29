"""Box transforms: the box stays on its object, and the phrase stays true."""

import numpy as np
import pytest

from mplug_jax.data.boxes import BoxTransform, crop_around, mirrored_phrase, names_place

HEIGHT, WIDTH = 60, 90
SIZE = (48, 64)


def picture(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    """A green rectangle on a ground that is red on the left and blue on the right half."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2, 0] = pixels[:, WIDTH // 2 :, 2] = 255
    pixels[y1:y2, x1:x2] = (0, 255, 0)
    return pixels


def drawn(seed: int) -> tuple[np.ndarray, list[float]]:
    """A picture with a rectangle at a random place, 6 pixels or larger, and its box."""
    rng = np.random.default_rng((1, seed))
    width, height = rng.integers(6, WIDTH), rng.integers(6, HEIGHT)
    x, y = rng.integers(WIDTH - width + 1), rng.integers(HEIGHT - height + 1)
    corners = [x / WIDTH, y / HEIGHT, (x + width) / WIDTH, (y + height) / HEIGHT]
    return picture(x, y, x + width, y + height), corners


def extent(image: np.ndarray) -> list[float]:
    """x1, y1, x2, y2 in pixels of what is green."""
    rows, columns = np.nonzero(image[..., 1] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def area(box: tuple[float, ...] | list[float]) -> float:
    """Part of the picture that a box covers."""
    return (box[2] - box[0]) * (box[3] - box[1])


def test_evaluation_resizes_alone():
    image, box = drawn(0)
    transform = BoxTransform(SIZE, crop_scale=(0.1, 0.2), flip=True)
    shown, same, phrase = transform(image, box, "left thing", None)
    assert shown.shape == (*SIZE, 3) and shown.dtype == np.uint8
    assert same == pytest.approx(box) and phrase == "left thing"
    unchanged, *_ = BoxTransform((HEIGHT, WIDTH))(image, box, "thing", None)
    np.testing.assert_array_equal(unchanged, image)


def test_the_box_stays_on_its_object_and_the_phrase_tells_whether_it_was_mirrored():
    transform = BoxTransform(SIZE, train=True, crop_scale=(0.3, 1.0), flip=True)
    plain = BoxTransform(SIZE, train=True, flip=True)
    scale = np.array([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    flips = grown = 0
    for seed in range(400):
        image, box = drawn(seed)
        shown, new, _ = transform(image, box, "a thing", np.random.default_rng(seed))
        assert shown.shape == (*SIZE, 3) and shown.dtype == np.uint8
        assert all(0.0 <= corner <= 1.0 for corner in new)
        assert np.abs(np.array(extent(shown)) - np.array(new) * scale).max() <= 1.0
        grown += area(new) > 1.05 * area(box)

        # Without a crop the ground shows both halves.
        image = picture(40, 20, 52, 30)
        shown, _, phrase = plain(
            image, [40 / 90, 1 / 3, 52 / 90, 0.5], "far left", np.random.default_rng(seed)
        )
        mirrored = bool(shown[0, 0, 2] > shown[0, 0, 0])
        assert phrase == ("far right" if mirrored else "far left")
        flips += mirrored
    assert 160 < flips < 240
    assert grown > 200


def test_areas_of_crops_lie_in_their_range():
    box = (30.0, 20.0, 36.0, 26.0)
    areas, lefts = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        left, top, width, height = crop_around(WIDTH, HEIGHT, box, rng, (0.3, 0.6))
        assert 0 <= left <= 30 and 36 <= left + width <= WIDTH
        assert 0 <= top <= 20 and 26 <= top + height <= HEIGHT
        assert 0.7 < (width / height) / (WIDTH / HEIGHT) < 1.4
        areas.append(width * height / (WIDTH * HEIGHT))
        lefts.append(left)
    assert 0.28 < min(areas) < 0.33 and 0.57 < max(areas) < 0.62
    assert np.mean(areas) == pytest.approx(0.45, abs=0.02)
    assert len(set(lefts)) > 15


def test_a_box_too_large_for_any_crop_keeps_the_whole_picture():
    rng = np.random.default_rng(0)
    assert crop_around(WIDTH, HEIGHT, (1.5, 0, 88.5, 60), rng, (0.2, 0.5)) == (0, 0, WIDTH, HEIGHT)
    for seed in range(20):
        image = picture(0, 0, WIDTH, HEIGHT)
        transform = BoxTransform(SIZE, train=True, crop_scale=(0.2, 1.0), flip=True)
        _, box, _ = transform(image, (0, 0, 1, 1), "all", np.random.default_rng(seed))
        assert box == (0.0, 0.0, 1.0, 1.0)


def test_boxes_beyond_the_picture_are_cut_off():
    transform = BoxTransform(SIZE, train=True, crop_scale=(0.2, 1.0), flip=True)
    for seed in range(50):
        image = picture(60, 0, WIDTH, 20)
        given = (60 / WIDTH, -0.01, 1.0000001, 20 / HEIGHT)
        shown, box, _ = transform(image, given, "a thing", np.random.default_rng(seed))
        assert all(0.0 <= corner <= 1.0 for corner in box)
        scale = np.array([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
        assert np.abs(np.array(extent(shown)) - np.array(box) * scale).max() <= 1.0


@pytest.mark.parametrize("word", ["left", "leftmost", "Bottom", "center", "the left-hand one"])
def test_phrases_that_name_a_place_are_never_cropped(word):
    transform = BoxTransform(SIZE, train=True, crop_scale=(0.2, 0.4))
    image, box = picture(40, 20, 52, 30), [40 / 90, 1 / 3, 52 / 90, 0.5]
    for seed in range(20):
        _, same, phrase = transform(image, box, f"dog {word}", np.random.default_rng(seed))
        assert same == pytest.approx(box) and phrase == f"dog {word}"
    _, other, _ = transform(image, box, "bright dog", np.random.default_rng(0))
    assert other != pytest.approx(box)


def test_words_within_words_name_no_place():
    for phrase in ("bright dog", "a copyright sign", "leftover pizza", "the stop sign", "laptop"):
        assert not names_place(phrase)
        assert mirrored_phrase(phrase) == phrase
    for phrase in ("2nd from right", "TOP bun", "upper shelf", "dog above cat", "rightmost"):
        assert names_place(phrase)


@pytest.mark.parametrize(
    ("phrase", "mirrored"),
    [
        ("man on the left of the right car", "man on the right of the left car"),
        ("Left-hand cup, RIGHT side", "Right-hand cup, LEFT side"),
        ("leftmost of the rightward arrows", "rightmost of the leftward arrows"),
        ("top dog", "top dog"),
    ],
)
def test_mirroring_swaps_left_and_right_and_back(phrase, mirrored):
    assert mirrored_phrase(phrase) == mirrored
    assert mirrored_phrase(mirrored) == phrase


def test_the_generator_alone_decides():
    transform = BoxTransform(SIZE, train=True, crop_scale=(0.2, 1.0), flip=True)
    image, box = drawn(3)
    seen = []
    for seed in (0, 0, 1):
        shown, new, phrase = transform(image, box, "a thing", np.random.default_rng(seed))
        seen.append((shown.tobytes(), new, phrase))
    assert seen[0] == seen[1] != seen[2]
