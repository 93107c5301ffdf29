"""Draws a scene: signed distances on the pixel grid, one pixel of antialiasing, numpy alone."""

import math
from collections.abc import Callable

import numpy as np

from mplug_jax.data.sources.scene_layout import LEVELS, Background, Layout, SceneObject

Array = np.ndarray
VISIBLE = 0.25  # coverage from which a pixel counts as the object's, for boxes


def _circle(x: Array, y: Array, r: float) -> Array:
    return np.sqrt(x * x + y * y) - r


def _square(x: Array, y: Array, r: float) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r


def _triangle(x: Array, y: Array, r: float) -> Array:
    """Equilateral, one corner up, its bounding box centred."""
    y = y - 0.2875 * r  # from the centre of the box to the centroid
    return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.575 * r


def _cross(x: Array, y: Array, r: float) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.97 * r, np.minimum(x, y) - 0.32 * r)


def _star(x: Array, y: Array, r: float) -> Array:
    """Five points, one up: fold the plane into a tenth, where one edge is left."""
    y = y - 0.09 * r
    outer, inner, tenth = 1.08 * r, 0.46 * r, math.pi / 5
    angle = np.abs(np.arctan2(x, -y))
    angle = np.abs((angle + tenth) % (2 * tenth) - tenth)
    radius = np.sqrt(x * x + y * y)
    # The edge runs from (outer, 0) to the inner corner, in the folded plane.
    ex, ey = inner * math.cos(tenth) - outer, inner * math.sin(tenth)
    length = math.hypot(ex, ey)
    return ((radius * np.cos(angle) - outer) * ey - radius * np.sin(angle) * ex) / length


def _diamond(x: Array, y: Array, r: float) -> Array:
    """A rhombus two thirds as wide as high."""
    return (np.abs(x) + 0.66 * np.abs(y) - 0.66 * r) / math.hypot(1.0, 0.66)


def _ring(x: Array, y: Array, r: float) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - 0.76 * r) - 0.24 * r


def _heart(x: Array, y: Array, r: float) -> Array:
    """A square on its corner with a disc on each upper edge."""
    y = y - 0.08 * r
    h = 0.8 * r
    x = np.abs(x)
    square = (x + np.abs(y) - h) / math.sqrt(2)
    disc = np.sqrt((x - h / 2) ** 2 + (y + h / 2) ** 2) - h / math.sqrt(2)
    return np.minimum(square, disc)


DISTANCES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "diamond": _diamond,
    "ring": _ring,
    "heart": _heart,
}
_CENTRES = np.arange(256, dtype=np.float32) + 0.5


def _window(obj: SceneObject, pixels: int) -> tuple[slice, slice]:
    """Rows and columns outside which the object has no coverage."""
    reach = 1.15 * obj.radius + 1.0
    return (
        slice(max(int(obj.cy - reach), 0), min(int(obj.cy + reach) + 1, pixels)),
        slice(max(int(obj.cx - reach), 0), min(int(obj.cx + reach) + 1, pixels)),
    )


def _window_coverage(obj: SceneObject, rows: slice, columns: slice) -> Array:
    x = _CENTRES[columns][None, :] - np.float32(obj.cx)
    y = _CENTRES[rows][:, None] - np.float32(obj.cy)
    if obj.angle:
        cos, sin = math.cos(obj.angle), math.sin(obj.angle)
        x, y = x * cos + y * sin, y * cos - x * sin
    alpha = np.float32(0.5) - DISTANCES[obj.shape](x, y, obj.radius)
    return np.clip(alpha, 0.0, 1.0, out=alpha)


def coverage(obj: SceneObject, pixels: int) -> Array:
    """How much of each pixel the whole object covers, float32 [pixels, pixels] in 0..1."""
    rows, columns = _window(obj, pixels)
    full = np.zeros((pixels, pixels), np.float32)
    full[rows, columns] = _window_coverage(obj, rows, columns)
    return full


def visible_coverage(layout: Layout) -> list[Array]:
    """The coverage of each object less what objects painted later hide of it."""
    visible = [coverage(obj, layout.pixels) for obj in layout.objects]
    order = paint_order(layout)
    for position, index in enumerate(order):
        for later in order[position + 1 :]:
            visible[index] = visible[index] * (1.0 - coverage(layout.objects[later], layout.pixels))
    return visible


def box(obj: SceneObject, pixels: int) -> list[float]:
    """[x1, y1, x2, y2] in 0..1, tight around the pixels the whole object covers (by VISIBLE or
    more), the parts hidden by another object included."""
    covered = coverage(obj, pixels) >= VISIBLE
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return [float(edge) / pixels for edge in edges]


def paint_order(layout: Layout) -> list[int]:
    """Large objects first, so that what hides something is always the smaller of the two."""
    return sorted(range(len(layout.objects)), key=lambda i: -layout.objects[i].radius)


def _ground(background: Background, pixels: int) -> Array:
    """The background, float32 [3, pixels, pixels] in 0..1."""
    start = np.array(background.start, np.float32)[:, None, None]
    if background.start == background.end:
        return np.repeat(start, pixels * pixels, axis=1).reshape(3, pixels, pixels)
    unit = (_CENTRES[:pixels] / pixels - 0.5) * np.float32(1 / math.sqrt(2))
    cos, sin = np.float32(math.cos(background.angle)), np.float32(math.sin(background.angle))
    ramp = unit[None, :] * cos + (unit[:, None] * sin + np.float32(0.5))
    return ramp * (np.array(background.end, np.float32)[:, None, None] - start) + start


def draw(layout: Layout, noise: bool = True) -> Array:
    """The picture of a scene, uint8 [pixels, pixels, 3]; the same layout gives the same bytes."""
    pixels = layout.pixels
    # Channels first until the end: numpy is slow where the innermost axis has three elements.
    canvas = _ground(layout.background, pixels)
    for index in paint_order(layout):
        obj = layout.objects[index]
        rows, columns = _window(obj, pixels)
        alpha = _window_coverage(obj, rows, columns)
        region = canvas[:, rows, columns]
        region += alpha * (np.array(obj.rgb, np.float32)[:, None, None] - region)
    if noise:
        rng = np.random.default_rng(layout.noise_seed)
        grain = rng.random(canvas.shape, np.float32)
        grain -= np.float32(0.5)
        grain *= np.float32(math.sqrt(12) * LEVELS[layout.level].noise)
        canvas += grain
    canvas *= np.float32(255.0)
    canvas += np.float32(0.5)
    return np.clip(canvas, 0.0, 255.0, out=canvas).astype(np.uint8).transpose(1, 2, 0).copy()
