"""A short clip of a scene in which one object moves along a straight line."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mplug_jax.data.sources.scene_drawing import draw
from mplug_jax.data.sources.scene_language import article, join, name
from mplug_jax.data.sources.scene_layout import Layout, SceneObject, Stream
from mplug_jax.data.sources.scene_placement import EDGE

FRAMES = 8
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


def _room(obj: SceneObject, direction: str, pixels: int) -> float:
    """How far the object can go before it reaches the border, in pixels."""
    low, high = obj.radius + EDGE, pixels - EDGE - obj.radius
    return {
        "left": obj.cx - low,
        "right": high - obj.cx,
        "up": obj.cy - low,
        "down": high - obj.cy,
    }[direction]


def _path(obj: SceneObject, direction: str, distance: float) -> list[SceneObject]:
    """The object in each frame, from where it is."""
    dx, dy = STEPS[direction]
    steps = [distance * t / (FRAMES - 1) for t in range(FRAMES)]
    return [replace(obj, cx=obj.cx + dx * s, cy=obj.cy + dy * s) for s in steps]


def _free(layout: Layout, index: int, path: list[SceneObject]) -> bool:
    """Whether the object comes no nearer to any other than touching, or than it was."""
    moving = path[0]
    for i, other in enumerate(layout.objects):
        if i == index:
            continue
        distances = [math.hypot(p.cx - other.cx, p.cy - other.cy) for p in path]
        if min(distances) < min(distances[0], moving.radius + other.radius):
            return False
    return True


def move(layout: Layout, stream: Stream) -> tuple[int, str, list[Layout]]:
    """One object of the scene on its way.

    Returns:
        The object's index, its direction ("left", "right", "up", "down"), and the scene in each
        of FRAMES frames, the first as it was. It goes at least a fifth of the picture's width and
        passes through no other object, unless every way is barred.
    """
    ways = [
        (i, direction, room)
        for i, obj in enumerate(layout.objects)
        for direction in STEPS
        if (room := _room(obj, direction, layout.pixels)) >= 0.25 * layout.pixels
    ]
    share = stream.uniform(0.8, 1.0)
    paths = [(i, d, _path(layout.objects[i], d, share * room)) for i, d, room in ways]
    free = [way for way in paths if _free(layout, way[0], way[2])]
    index, direction, path = stream.pick(free or paths)
    frames = [
        replace(
            layout,
            objects=(*layout.objects[:index], obj, *layout.objects[index + 1 :]),
            noise_seed=layout.noise_seed + t,
        )
        for t, obj in enumerate(path)
    ]
    return index, direction, frames


def clip(layout: Layout, stream: Stream) -> dict[str, Any]:
    """The scene in motion: video uint8 [FRAMES, H, W, 3], two captions, of which the first tells
    all objects and their sizes, and questions of the types direction, colour and shape (of what
    moves)."""
    index, direction, frames = move(layout, stream)
    obj = layout.objects[index]
    still = [article(other, size=True) for i, other in enumerate(layout.objects) if i != index]
    told = f"{article(obj, size=True)} moves {MOTIONS[direction]}"
    if still:
        told = f"{told} while {join(still)} {'stays' if len(still) == 1 else 'stay'} still"
    alone = sum((o.colour, o.shape) == (obj.colour, obj.shape) for o in layout.objects) == 1
    asked = {
        "direction": (f"which way does the {name(obj) if alone else 'object'} move", direction),
        "colour": ("what colour is the object that moves", obj.colour),
        "shape": ("what shape is the object that moves", obj.shape),
    }
    return {
        "video": np.stack([draw(frame) for frame in frames]),
        "captions": [told, f"{article(obj)} moves {MOTIONS[direction]}"],
        "questions": [
            {"question": question, "answers": {answer: 1.0}, "type": kind}
            for kind, (question, answer) in asked.items()
        ],
    }
