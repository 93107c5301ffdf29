"""What is in a scene and where: levels, objects, geometry, and the split a scene belongs to.

Coordinates are pixels, x to the right and y downwards, the origin at the top left corner of the
picture; the centre of the first pixel is (0.5, 0.5). A `Layout` says everything that the drawing
and the sentences need, so both are pure functions of it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
RGB = tuple[float, float, float]
Kind = tuple[str, str, str]  # size, colour, shape
Cell = tuple[int, int]  # column and row in the 3 x 3 grid of places, 0..2 each

COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.10, 0.68, 0.16),
    "blue": (0.14, 0.32, 0.98),
    "yellow": (0.97, 0.90, 0.10),
    "purple": (0.72, 0.22, 0.86),
    "white": (0.97, 0.97, 0.97),
    "orange": (1.00, 0.52, 0.06),
    "cyan": (0.12, 0.86, 0.90),
}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LevelSpec:
    """Everything in which the two levels differ. Lengths are in pixels, colours in 0..1."""

    name: str
    pixels: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: dict[str, tuple[float, float]]  # the range of radii of each size word
    max_objects: int
    cell_margin: float  # a centre keeps this distance from the lines between two places
    overlap: float  # how deep two objects may overlap, in radii of the smaller; < 0 is a gap
    close: float  # share of the scenes with two or more in which two are put close together
    tilt: float  # largest rotation, radians
    brightness: float  # an object is darkened by up to this share
    tint: float  # each channel of an object moves by up to this much
    background: tuple[float, float]  # range of the grey level of the background
    background_tint: float
    gradient: bool
    noise: float  # standard deviation


LEVELS: dict[str, LevelSpec] = {
    "easy": LevelSpec(
        name="easy",
        pixels=32,
        shapes=("circle", "square", "triangle", "cross"),
        colours=("red", "green", "blue", "yellow", "purple", "white"),
        sizes={"small": (4.6, 5.1), "large": (6.8, 7.4)},
        max_objects=2,
        cell_margin=0.4,
        overlap=-0.12,
        close=0.0,
        tilt=0.0,
        brightness=0.06,
        tint=0.03,
        background=(0.04, 0.12),
        background_tint=0.02,
        gradient=False,
        noise=0.012,
    ),
    "full": LevelSpec(
        name="full",
        pixels=64,
        shapes=("circle", "square", "triangle", "cross", "star", "diamond", "ring", "heart"),
        colours=("red", "green", "blue", "yellow", "purple", "white", "orange", "cyan"),
        sizes={"small": (5.2, 6.0), "medium": (7.8, 8.7), "large": (11.0, 12.2)},
        max_objects=4,
        cell_margin=1.2,
        overlap=0.7,
        close=0.45,
        tilt=0.16,
        brightness=0.18,
        tint=0.05,
        background=(0.05, 0.42),
        background_tint=0.08,
        gradient=True,
        noise=0.035,
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One object; `radius` in pixels bounds its extent along both axes, `angle` is in radians."""

    shape: str
    colour: str
    size: str
    cx: float
    cy: float
    radius: float
    angle: float
    rgb: RGB

    @property
    def kind(self) -> Kind:
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Background:
    """A linear gradient from `start` to `end` along `angle` (radians), or plain if they agree."""

    start: RGB
    end: RGB
    angle: float


@dataclass(frozen=True)
class Layout:
    """A scene. `objects` are in the order in which sentences name them (see `naming_order`)."""

    level: str
    objects: tuple[SceneObject, ...]
    background: Background
    noise_seed: int

    @property
    def pixels(self) -> int:
        return LEVELS[self.level].pixels

    def cell(self, index: int) -> Cell:
        """Place of object `index` in the 3 x 3 grid: (column, row)."""
        return cell_of(self.objects[index], self.pixels)


class Stream:
    """Uniform random numbers that depend on `entropy` alone; numpy draws them a block at a time,
    since one scalar draw costs as much as a whole block."""

    def __init__(self, *entropy: int) -> None:
        self._rng = np.random.default_rng(entropy)
        self._block: list[float] = []

    def unit(self) -> float:
        """A float in [0, 1)."""
        if not self._block:
            self._block = self._rng.random(48).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self.unit() * n)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [item for _, item in sorted(((self.unit(), x) for x in items), key=lambda t: t[0])]


def cell_of(obj: SceneObject, pixels: int) -> Cell:
    """The (column, row) of the object's centre in the 3 x 3 grid of places."""
    return min(int(3 * obj.cx / pixels), 2), min(int(3 * obj.cy / pixels), 2)


def holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` is left / right / above / below of `b`: that axis separates them the most."""
    dx, dy = b.cx - a.cx, b.cy - a.cy
    if relation in ("left", "right"):
        return abs(dx) > abs(dy) and (dx > 0) == (relation == "left")
    return abs(dy) > abs(dx) and (dy > 0) == (relation == "above")


def clear_relation(a: SceneObject, b: SceneObject, pixels: int) -> str | None:
    """The relation of `a` to `b` that nobody would dispute, or None.

    One axis separates them by an eighth of the picture and by 1.6 times the other axis.
    """
    dx, dy = b.cx - a.cx, b.cy - a.cy
    if abs(dx) >= max(pixels / 8, 1.6 * abs(dy)):
        return "left" if dx > 0 else "right"
    if abs(dy) >= max(pixels / 8, 1.6 * abs(dx)):
        return "above" if dy > 0 else "below"
    return None


def naming_order(objects: Sequence[SceneObject], pixels: int) -> tuple[SceneObject, ...]:
    """The order of the sentences: two objects along the axis that separates them, more by column
    of the 3 x 3 grid from left to right, then by row from the top, then by x."""
    if len(objects) == 2:
        first, second = objects
        swap = holds("right", first, second) or holds("below", first, second)
        return (second, first) if swap else (first, second)
    return tuple(sorted(objects, key=lambda o: (*cell_of(o, pixels), o.cx)))


def semantic_key(level: str, kinds: Sequence[Kind], where: object) -> str:
    """What the canonical caption says, as a string: kinds in naming order and where they are.

    `where` is the cell of one object, the axis of two, the cells of more.
    """
    return f"{level}|{'|'.join(' '.join(kind) for kind in kinds)}|{where}"


def layout_key(layout: Layout) -> str:
    """The `semantic_key` of a finished scene."""
    objects = layout.objects
    where: object
    if len(objects) == 1:
        where = layout.cell(0)
    elif len(objects) == 2:
        where = "horizontal" if holds("left", *objects) else "vertical"
    else:
        where = [layout.cell(i) for i in range(len(objects))]
    return semantic_key(layout.level, [o.kind for o in objects], where)


def split_of(key: str) -> str:
    """The split that owns a key: train 6/8, val 1/8, test 1/8 of all keys, the same everywhere.

    A checksum is linear in its input's bits, and the keys differ in few words: a multiplication
    mixes them (2654435761 is Knuth's constant) so that every word gets its share in each split.
    """
    share = (zlib.crc32(key.encode()) * 2654435761 & 0xFFFFFFFF) >> 29
    return "val" if share == 6 else "test" if share == 7 else "train"


def all_kinds(spec: LevelSpec) -> list[Kind]:
    return [(s, c, h) for s in spec.sizes for c in spec.colours for h in spec.shapes]
