"""What a layout promises of its picture, measured in pixels."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mplug_jax.data.sources.scene_drawing import box, coverage, draw, visible_coverage
from mplug_jax.data.sources.scene_layout import (
    COLOURS,
    LEVELS,
    Background,
    Layout,
    SceneObject,
    cell_of,
)
from mplug_jax.data.sources.scenes import Scenes

levels = pytest.mark.parametrize("level", list(LEVELS))


def layouts(level: str, count: int) -> list[Layout]:
    source = Scenes(level, "train")
    return [source.layout(i) for i in range(count)]


# Areas in squared radii, from the shapes' definitions in plane geometry.
AREAS = {
    "circle": math.pi,
    "square": 1.72**2,
    "triangle": math.sqrt(3) / 4 * (1.15 * math.sqrt(3)) ** 2,
    "cross": 2 * 1.94 * 0.64 - 0.64**2,
    "star": 5 * 1.08 * 0.46 * math.sin(math.pi / 5),
    "diamond": 2 * 0.66,
    "ring": math.pi * (1 - 0.52**2),
    "heart": 2 * 0.8**2 + math.pi * 0.8**2 / 2,
}


@pytest.mark.parametrize("shape", LEVELS["full"].shapes)
@pytest.mark.parametrize("angle", [0.0, 0.15])
def test_shapes_have_their_areas_and_fit_their_radius(shape, angle):
    obj = SceneObject(shape, "red", "large", 64.0, 64.0, 50.0, angle, COLOURS["red"])
    alpha = coverage(obj, 128)
    assert alpha.sum() == pytest.approx(AREAS[shape] * 50.0**2, rel=0.01)
    rows, columns = np.nonzero(alpha > 0.5)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 1.7 * 50 < extent < 2.2 * 50
    if angle == 0.0:
        assert np.allclose(alpha, alpha[:, ::-1], atol=1e-4)


@levels
def test_boxes_enclose_exactly_the_pixels_of_the_object(level):
    """Drawn alone on black in white, without noise, a pixel's value is its coverage."""
    for layout in layouts(level, 60):
        for obj in layout.objects:
            black = Background((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0)
            white = replace(obj, rgb=(1.0, 1.0, 1.0))
            alone = replace(layout, objects=(white,), background=black)
            value = draw(alone, noise=False)[..., 0] / 255.0
            x1, y1, x2, y2 = (round(edge * layout.pixels) for edge in box(obj, layout.pixels))
            inside = value[y1:y2, x1:x2]
            # A pixel more or less than a quarter covered, up to the rounding to bytes.
            assert np.sum(value > 0.254) == np.sum(inside > 0.254)
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() > 0.246


@levels
def test_objects_lie_inside_and_clear_of_the_lines_between_places(level):
    spec = LEVELS[level]
    for layout in layouts(level, 400):
        for obj in layout.objects:
            for centre in (obj.cx, obj.cy):
                assert obj.radius + 0.49 <= centre <= spec.pixels - obj.radius - 0.49
                for line in (spec.pixels / 3, 2 * spec.pixels / 3):
                    assert abs(centre - line) >= spec.cell_margin - 1e-9
            low, high = spec.sizes[obj.size]
            assert low <= obj.radius <= high


@levels
def test_every_object_stays_visible(level):
    overlapping = 0
    for layout in layouts(level, 500):
        for obj, visible in zip(layout.objects, visible_coverage(layout), strict=True):
            share = visible.sum() / coverage(obj, layout.pixels).sum()
            assert share >= (0.65 if level == "full" else 0.999)
            overlapping += share < 0.98
    if level == "full":
        assert overlapping > 50


@levels
def test_colours_can_be_told_apart(level):
    """The mean colour under each object is nearest to the colour that its word names."""
    names = LEVELS[level].colours
    palette = np.array([COLOURS[name] for name in names])
    for layout in layouts(level, 300):
        image = draw(layout) / 255.0
        for obj, visible in zip(layout.objects, visible_coverage(layout), strict=True):
            mean = image[visible > 0.95].mean(axis=0)
            nearest = names[int(np.linalg.norm(palette - mean, axis=1).argmin())]
            assert nearest == obj.colour


@levels
def test_objects_stand_out_from_the_background(level):
    for layout in layouts(level, 300):
        ground = draw(replace(layout, objects=()), noise=False) / 255.0
        image = draw(layout, noise=False) / 255.0
        for visible in visible_coverage(layout):
            inside = visible > 0.95
            contrast = np.linalg.norm(image[inside] - ground[inside], axis=1).mean()
            assert contrast > 6 * LEVELS[level].noise
            assert contrast > 0.25


def test_easy_scenes_are_found_again_in_their_pixels():
    """Reads number, places and axis of the objects from the picture alone."""
    for layout in layouts("easy", 200):
        bright = (draw(layout).max(axis=2) > 90).astype(int)
        blobs = _components(bright)
        assert len(blobs) == len(layout.objects)
        centres = [
            ((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
            for rows, columns in blobs
        ]
        for obj in layout.objects:
            assert min(math.hypot(x - obj.cx, y - obj.cy) for x, y in centres) < 1.0


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Connected regions (four neighbours) of at least five pixels."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        stack, blob = [left.pop()], []
        while stack:
            row, column = stack.pop()
            blob.append((row, column))
            for near in (
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            ):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        if len(blob) >= 5:
            rows, columns = np.array(blob).T
            found.append((rows, columns))
    return found


@levels
def test_pairs_have_a_clear_relation(level):
    """Two objects: along one axis at least twice as far apart as along the other, and named from
    left to right or from top to bottom."""
    axes = Counter()
    for layout in layouts(level, 600):
        if len(layout.objects) == 2:
            a, b = layout.objects
            dx, dy = b.cx - a.cx, b.cy - a.cy
            assert max(abs(dx), abs(dy)) >= 2 * min(abs(dx), abs(dy)) - 1e-9
            assert (dx if abs(dx) > abs(dy) else dy) >= layout.pixels / 8
            axes[abs(dx) > abs(dy)] += 1
    assert abs(axes[True] / axes.total() - 0.5) < 0.12


def test_many_objects_are_named_by_column_then_row():
    for layout in layouts("full", 400):
        if len(layout.objects) > 2:
            cells = [cell_of(obj, layout.pixels) for obj in layout.objects]
            assert cells == sorted(cells)


def test_noise_is_as_strong_as_the_level_says():
    for level, spec in LEVELS.items():
        layout = replace(
            layouts(level, 1)[0],
            objects=(),
            background=Background((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.0),
        )
        assert np.std(draw(layout) / 255.0) == pytest.approx(spec.noise, rel=0.1)
        assert np.ptp(draw(layout, noise=False)) == 0
