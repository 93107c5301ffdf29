"""Boxes of phrases, each written as four coordinate tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mplug_jax.data.boxes import BoxTransform
from mplug_jax.data.items import Items
from mplug_jax.data.task_examples import PhraseExamples
from mplug_jax.evaluation.grounding import THRESHOLD, box_iou, corners, grounding_metrics
from mplug_jax.generation.greedy import greedy
from mplug_jax.objectives.grounding import bins_to_boxes
from mplug_jax.tasks.evaluators.held_out import HeldOut, Sheet, write_json
from mplug_jax.tasks.forward import text_memory
from mplug_jax.tasks.grounding import coordinate_mask, coordinate_tokens

TRUE_COLOUR, PREDICTED_COLOUR = "#00c853", "#ff9100"
# Small pictures are enlarged to about this width before boxes are drawn on them.
DRAWN_WIDTH = 192


class GroundingEvaluator:
    """Overlap of predicted and true boxes.

    Args:
      limit: phrases; 0 takes all.

    Raises:
      SourceError: the source has no phrases.
      ValueError: the model's vocabulary ends before the coordinate tokens do.
    """

    def __init__(self, data: HeldOut, *, limit: int):
        setup, tokens = data.setup, coordinate_tokens(data.setup)
        self._data = data
        self._items = Items(data.source, "phrases", limit)
        transform = BoxTransform(setup.image_size, train=False)
        self._examples = PhraseExamples(setup.tokenizer, transform, setup.config.data.text_length)
        bins = coordinate_mask(setup)

        def locate(params: Any, batch: Any) -> jax.Array:
            inputs = batch["image"], batch["text_ids"], batch["text_mask"]
            written = greedy(
                setup.model,
                params,
                *text_memory(data.forward(params), *inputs),
                max_length=4,
                prompt_ids=jnp.array([tokens.prefix]),
                allowed=jnp.asarray(bins),
                **data.special,
            )
            return bins_to_boxes(written - tokens.first, tokens)

        self._locate = data.compiled(locate)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """``acc@0.5``, the phrases whose box has an IoU of 0.5 or more, and ``mean_iou``, both in
        percent."""
        boxes: dict[int, np.ndarray] = {}
        truths: dict[int, np.ndarray] = {}
        lines: list[dict[str, Any]] = []
        sheet = Sheet()
        inputs = ("image", "text_ids", "text_mask")
        rows = self._data.each(self._locate, params, self._examples, inputs, source=self._items)
        for index, example, box in rows:
            boxes[index] = np.clip(corners(box), 0.0, 1.0)
            truths[index] = corners(example["box"])
            if samples is None:
                continue
            record = self._items[index]
            phrase = record["phrases"][0]["phrase"]
            named = {"id": record["id"], "phrase": phrase}
            found = {"box": boxes[index].tolist(), "true": truths[index].tolist()}
            lines.append(named | found)
            overlap = float(box_iou(boxes[index], truths[index]))
            if sheet.wants(example):
                drawn = draw_boxes(example["image"], truths[index], boxes[index])
                title = f"{phrase}\nIoU {overlap:.2f}"
                sheet.add(example, title, overlap >= THRESHOLD, drawn=drawn)
        if samples is not None:
            write_json(samples / "boxes.json", lines)
            sheet.write(samples / "grounding.png")
        metrics = grounding_metrics(boxes, truths)
        return {"acc@0.5": metrics["accuracy"], "mean_iou": metrics["mean_iou"]}


def draw_boxes(picture: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The picture, enlarged if small, with the true box in green and the predicted in orange.

    Args:
      picture: uint8 ``[H, W, 3]``.
      true, predicted: ``[4]`` corners as fractions.
    """
    height, width = picture.shape[:2]
    scale = max(1, DRAWN_WIDTH // width)
    size = (width * scale, height * scale)
    image = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    line = max(2, size[0] // 100)
    for box, colour in ((true, TRUE_COLOUR), (predicted, PREDICTED_COLOUR)):
        # A predicted box may have its corners on top of each other, or the wrong way round.
        x1, x2 = sorted(box[[0, 2]] * (size[0] - 1))
        y1, y2 = sorted(box[[1, 3]] * (size[1] - 1))
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
    return np.asarray(image)
