"""Where in a picture a phrase is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mplug_jax.generation.greedy import greedy
from mplug_jax.objectives.grounding import bins_to_boxes, to_corners
from mplug_jax.prediction.model import Model, PredictionError, one
from mplug_jax.tasks.forward import text_memory
from mplug_jax.tasks.grounding import coordinate_mask, coordinate_tokens

COLOUR = "#ff9100"

Box = tuple[float, float, float, float]


def locator(model: Model) -> Callable[[np.ndarray, str], Box]:
    """A function from pixels ``[h, w, 3]`` and a phrase to a box of that picture: left, top, right
    and bottom in pixels.

    Raises:
      PredictionError: the vocabulary ends before the coordinate tokens do.
    """
    setup, tokens = model.setup, coordinate_tokens(model.setup)
    try:
        bins = coordinate_mask(setup)
    except ValueError as error:
        raise PredictionError(f"The model has no coordinate tokens: {error}") from error

    start, allowed = jnp.array([tokens.prefix]), jnp.asarray(bins)

    @jax.jit
    def locate(params: Any, image: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        written = greedy(
            setup.model,
            params,
            *text_memory(model.forward(params), image, ids, mask),
            max_length=4,
            prompt_ids=start,
            allowed=allowed,
            **model.special,
        )
        return jnp.clip(to_corners(bins_to_boxes(written - tokens.first, tokens)), 0.0, 1.0)[0]

    def box(pixels: np.ndarray, phrase: str) -> Box:
        height, width = pixels.shape[:2]
        found = locate(model.params, one(model.picture(pixels)), *model.texts([phrase]))
        x1, y1, x2, y2 = (np.asarray(found, np.float64) * [width, height, width, height]).tolist()
        return x1, y1, x2, y2

    return box


def draw_box(pixels: np.ndarray, box: Box, path: str) -> None:
    """Writes the picture ``[h, w, 3]`` with the box drawn on it.

    Raises:
      PredictionError: the file cannot be written.
    """
    image = Image.fromarray(pixels)
    x1, y1, x2, y2 = box
    # The outline lies on the box's own pixels; a box may have no area.
    right, bottom = max(x1, min(x2, image.width) - 1), max(y1, min(y2, image.height) - 1)
    line = max(1, round(min(image.size) / 100))
    ImageDraw.Draw(image).rectangle((x1, y1, right, bottom), outline=COLOUR, width=line)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise PredictionError(f"--out={path} cannot be written: {error}.") from error
