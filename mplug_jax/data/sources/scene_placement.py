"""Where the objects of a scene go: random layouts that belong to a split."""

import math
from collections.abc import Sequence

from mplug_jax.data.sources.scene_layout import (
    COLOURS,
    RGB,
    Background,
    Cell,
    Kind,
    Layout,
    LevelSpec,
    SceneObject,
    Stream,
    layout_key,
    naming_order,
    semantic_key,
    split_of,
)

EDGE = 0.5  # pixels between an object and the border of the picture
REACH = 1.1  # two objects may overlap when nearer than this many times the sum of their radii
TWIN_SHARE = 0.35  # of the scenes with three or four objects, how many hold two of one kind
_Placed = tuple[Kind, float, float, float]  # kind, radius, x, y


def draw_kind(spec: LevelSpec, stream: Stream) -> Kind:
    return stream.pick(tuple(spec.sizes)), stream.pick(spec.colours), stream.pick(spec.shapes)


def draw_kinds(spec: LevelSpec, stream: Stream, n: int) -> list[Kind]:
    """Kinds of `n` objects. Two objects always differ in colour or shape; of more, two may be
    twins in colour and shape, which is what makes counting worth learning."""
    kinds = [draw_kind(spec, stream) for _ in range(n)]
    if n == 2:
        while kinds[0][1:] == kinds[1][1:]:
            kinds[1] = draw_kind(spec, stream)
    elif n > 2 and stream.unit() < TWIN_SHARE:
        kinds[1] = (kinds[1][0], *kinds[0][1:])
    return kinds


def _radius(spec: LevelSpec, stream: Stream, kind: Kind) -> float:
    return stream.uniform(*spec.sizes[kind[0]])


def _object(
    spec: LevelSpec, stream: Stream, kind: Kind, radius: float, cx: float, cy: float
) -> SceneObject:
    size, colour, shape = kind
    gain = 1.0 - spec.brightness * stream.unit()
    red, green, blue = (
        min(max(gain * c + stream.uniform(-spec.tint, spec.tint), 0.0), 1.0)
        for c in COLOURS[colour]
    )
    angle = stream.uniform(-spec.tilt, spec.tilt)
    return SceneObject(shape, colour, size, cx, cy, radius, angle, (red, green, blue))


def _in_cell(spec: LevelSpec, stream: Stream, radius: float, cell: Cell) -> tuple[float, float]:
    """A centre inside `cell`, clear of the lines between cells, the object inside the picture."""
    third, margin = spec.pixels / 3, spec.cell_margin
    x, y = (
        stream.uniform(
            max(radius + EDGE, i * third + margin),
            min(spec.pixels - radius - EDGE, (i + 1) * third - margin),
        )
        for i in cell
    )
    return x, y


def _clear_of_lines(spec: LevelSpec, *coordinates: float) -> bool:
    third = spec.pixels / 3
    return all(
        abs(c - line) >= spec.cell_margin for c in coordinates for line in (third, 2 * third)
    )


def _least_distance(spec: LevelSpec, a: Kind, b: Kind, ra: float, rb: float) -> float:
    """Two objects of one colour never touch: nobody could tell where one ends."""
    return ra + rb + (1.5 if a[1] == b[1] and spec.overlap > 0 else -spec.overlap * min(ra, rb))


def place_one(spec: LevelSpec, stream: Stream, kind: Kind, cell: Cell) -> list[SceneObject]:
    radius = _radius(spec, stream, kind)
    return [_object(spec, stream, kind, radius, *_in_cell(spec, stream, radius, cell))]


def place_pair(
    spec: LevelSpec, stream: Stream, kinds: Sequence[Kind], axis: str
) -> list[SceneObject]:
    """Two objects, the first to the left ("horizontal") or above ("vertical"): their distance
    along that axis is at least twice that along the other, and a clear relation."""
    (first, second), pixels = kinds, spec.pixels
    while True:
        ra, rb = _radius(spec, stream, first), _radius(spec, stream, second)
        least = max(_least_distance(spec, first, second, ra, rb), pixels / 8)
        most = pixels - 2 * EDGE - ra - rb
        if stream.unit() < spec.close:
            most = max(min(ra + rb, most), least)
        gap = stream.uniform(least, most)
        a = stream.uniform(ra + EDGE, pixels - EDGE - rb - gap)
        a_other = stream.uniform(ra + EDGE, pixels - EDGE - ra)
        b_other = stream.uniform(
            max(rb + EDGE, a_other - gap / 2), min(pixels - EDGE - rb, a_other + gap / 2)
        )
        if _clear_of_lines(spec, a, a + gap, a_other, b_other):
            break
    at = [(a, a_other), (a + gap, b_other)]
    if axis == "vertical":
        at = [(y, x) for x, y in at]
    return [
        _object(spec, stream, kind, radius, *xy)
        for kind, radius, xy in zip(kinds, (ra, rb), at, strict=True)
    ]


def _near(
    spec: LevelSpec, stream: Stream, kind: Kind, radius: float, anchor: _Placed
) -> tuple[float, float] | None:
    """A centre from which the object touches or overlaps `anchor`; None when a random one falls
    outside the picture or near a line between places."""
    least = _least_distance(spec, kind, anchor[0], radius, anchor[1])
    distance = stream.uniform(least, max(radius + anchor[1], least + 1.0))
    angle = stream.uniform(0.0, 2 * math.pi)
    x, y = anchor[2] + distance * math.cos(angle), anchor[3] + distance * math.sin(angle)
    low, high = radius + EDGE, spec.pixels - radius - EDGE
    inside = low <= x <= high and low <= y <= high
    return (x, y) if inside and _clear_of_lines(spec, x, y) else None


def _fits(
    spec: LevelSpec, kind: Kind, radius: float, x: float, y: float, others: Sequence[_Placed]
) -> bool:
    """Whether the object overlaps at most one of the others, that no third, and not deeply."""
    touched = []
    for other in others:
        distance = math.hypot(x - other[2], y - other[3])
        if distance < _least_distance(spec, kind, other[0], radius, other[1]):
            return False
        if distance < REACH * (radius + other[1]):
            touched.append(other)
    return not touched or (
        len(touched) == 1
        and all(
            math.hypot(touched[0][2] - o[2], touched[0][3] - o[3]) >= REACH * (touched[0][1] + o[1])
            for o in others
            if o is not touched[0]
        )
    )


def place_many(spec: LevelSpec, stream: Stream, kinds: Sequence[Kind]) -> list[SceneObject]:
    """Three or more objects, at least 65 % of each visible; in some scenes the last is put close
    to the first."""
    close = stream.unit() < spec.close
    while True:
        placed: list[_Placed] = []
        for kind in kinds:
            radius = _radius(spec, stream, kind)
            for _ in range(12):
                if close and len(placed) == len(kinds) - 1:
                    at = _near(spec, stream, kind, radius, placed[0])
                else:
                    cell = (stream.below(3), stream.below(3))
                    at = _in_cell(spec, stream, radius, cell)
                if at is not None and _fits(spec, kind, radius, *at, placed):
                    placed.append((kind, radius, *at))
                    break
            else:
                break
        if len(placed) == len(kinds):
            return [_object(spec, stream, *item) for item in placed]


def finish_layout(spec: LevelSpec, stream: Stream, objects: Sequence[SceneObject]) -> Layout:
    """Adds the background and the seed of the noise, and puts the objects in naming order."""

    def shade() -> RGB:
        grey, tint = stream.uniform(*spec.background), spec.background_tint
        red, green, blue = (max(grey + stream.uniform(-tint, tint), 0.0) for _ in range(3))
        return red, green, blue

    start = shade()
    end = shade() if spec.gradient else start
    background = Background(start, end, stream.uniform(0.0, 2 * math.pi))
    ordered = naming_order(objects, spec.pixels)
    return Layout(spec.name, ordered, background, stream.below(2**31))


def draw_layout(spec: LevelSpec, split: str, stream: Stream, n: int) -> Layout:
    """A random scene of `n` objects that belongs to `split`: attempts go on until one does."""
    while True:
        kinds = draw_kinds(spec, stream, n)
        layout = try_layout(spec, split, stream, kinds)
        if layout is not None:
            return layout


def try_layout(spec: LevelSpec, split: str, stream: Stream, kinds: Sequence[Kind]) -> Layout | None:
    """One attempt to place `kinds`; None when the scene belongs to another split."""
    if len(kinds) == 1:
        cell = (stream.below(3), stream.below(3))
        if split_of(semantic_key(spec.name, kinds, cell)) != split:
            return None
        return finish_layout(spec, stream, place_one(spec, stream, kinds[0], cell))
    if len(kinds) == 2:
        axis = stream.pick(("horizontal", "vertical"))
        if split_of(semantic_key(spec.name, kinds, axis)) != split:
            return None
        return finish_layout(spec, stream, place_pair(spec, stream, kinds, axis))
    layout = finish_layout(spec, stream, place_many(spec, stream, kinds))
    return layout if split_of(layout_key(layout)) == split else None
