"""What the evaluators share: held-out records in batches over the mesh, and what is shown of them.

Every process reads the whole held-out set and holds every result; devices share the work.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.pipeline import MakeExample, eval_batches
from mplug_jax.data.records import Source
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.generation.beam import BeamConfig, beam_search
from mplug_jax.generation.greedy import greedy
from mplug_jax.tasks.forward import Forward
from mplug_jax.tasks.setup import Setup
from mplug_jax.training.reports import sample_sheet
from mplug_jax.training.sharding import batch_parts, jit_on, place_global_batch, replicated
from mplug_jax.training.signals import between_batches

# Pictures of a batch, and pictures of a sheet.
BATCH_SIZE = 64
SHEET_ROWS = 16
# Frames of a clip that a sheet shows.
SHOWN_FRAMES = 4

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is evaluated on what.

    Attributes:
      setup: the model, its tokenizer and the run's settings.
      source: the held-out records.
      mesh: the devices that share the work.
    """

    setup: Setup
    source: Source
    mesh: Any

    @property
    def transform(self) -> ImageTransform:
        """What happens to a held-out picture: it is resized."""
        return ImageTransform(self.setup.image_size, train=False)

    @property
    def special(self) -> dict[str, int]:
        """The ids that decoding asks for."""
        t = self.setup.tokenizer
        return {"cls_id": t.cls_id, "sep_id": t.sep_id, "pad_id": t.pad_id}

    def rows(self, pictures: int = BATCH_SIZE) -> int:
        """Rows of a batch of about so many pictures or frames, as many for each device."""
        parts = batch_parts(self.mesh)
        return max(-(-pictures // (self.setup.model_config.frames * parts)), 1) * parts

    def forward(self, params: Any) -> Forward:
        """The model with these parameters, without dropout."""
        return Forward(self.setup.model, params)

    def compiled(self, function: Callable[..., Any]) -> Any:
        """``function`` compiled, its result on every device."""
        return jit_on(self.mesh, function, replicated(self.mesh))

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch split over the devices; here a training that is to end leaves off evaluating."""
        between_batches()
        return place_global_batch(batch, self.mesh)

    def each(
        self,
        compute: Callable[[Any, Any], jax.Array],
        params: Any,
        make_example: MakeExample,
        inputs: tuple[str, ...],
        *,
        source: Source | None = None,
        limit: int = 0,
    ) -> Iterator[tuple[int, Example, np.ndarray]]:
        """What ``compute(params, batch of inputs)`` gives for every usable record.

        Args:
          make_example: how records become model input.
          inputs: the arrays of an example that ``compute`` takes.
          source: a view of the source to go over instead.
          limit: only the first records; 0 takes all.

        Yields:
          (place in the source, example, row of the result).
        """
        source = self.source if source is None else source
        for batch in eval_batches(source, make_example, self.rows(), limit or None):
            placed = self.place({name: batch[name] for name in inputs})
            result = np.asarray(compute(params, placed))
            for row in np.flatnonzero(batch["valid"]):
                example = {name: value[row] for name, value in batch.items()}
                yield int(batch["index"][row]), example, result[row]


def best_texts(
    data: HeldOut,
    params: Any,
    memory: tuple[jax.Array, jax.Array],
    config: BeamConfig,
    prompt_ids: np.ndarray | None = None,
) -> jax.Array:
    """The likeliest text found for each picture, ``[B, max_length]`` without the prompt.

    A single beam is greedy decoding.
    """
    model, options = data.setup.model, data.special
    if prompt_ids is not None:
        options["prompt_ids"] = jnp.asarray(prompt_ids)
    if config.beams == 1:
        lengths = {"max_length": config.max_length, "min_length": config.min_length}
        return greedy(model, params, *memory, **lengths, **options)
    return beam_search(model, params, *memory, config, **options).ids[:, 0]


class Sheet:
    """The first pictures, each once, with what the model said of them; see ``sample_sheet``."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []
        self.titles: list[str] = []
        self.marks: list[bool | None] = []
        self._shown: set[int] = set()

    def wants(self, example: Mapping[str, Any]) -> bool:
        """Whether there is room for the picture of an example, which is not there yet."""
        return len(self.pictures) < SHEET_ROWS and int(example["image_id"]) not in self._shown

    def add(
        self,
        example: Mapping[str, Any],
        title: str,
        right: bool | None = None,
        *,
        drawn: np.ndarray | None = None,
    ) -> None:
        """The picture ``[H, W, 3]`` of an example, or what was drawn on it, unless the sheet does
        not want it; of several, ``[T, H, W, 3]``, some side by side."""
        if not self.wants(example):
            return
        self._shown.add(int(example["image_id"]))
        picture = example["image"] if drawn is None else drawn
        if picture.ndim == 4:
            chosen = np.linspace(0, len(picture) - 1, min(len(picture), SHOWN_FRAMES)).astype(int)
            picture = np.concatenate(list(picture[chosen]), axis=1)
        self.pictures.append(picture)
        self.titles.append(title)
        self.marks.append(right)

    def write(self, path: Path) -> None:
        """Draws the sheet."""
        sample_sheet(path, np.stack(self.pictures), self.titles, ok=self.marks)


def write_json(path: Path, value: Any) -> None:
    """Writes a file of results, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
