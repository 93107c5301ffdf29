"""The order of training examples and how each is made: what data workers run.

The order is a function of (seed, epoch, index); the generator of an example one of (seed, its
position in the order).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from mplug_jax.data.augmented import made_for
from mplug_jax.data.records import BadSample, Record, Source, SourceError

logger = logging.getLogger(__name__)

Example = dict[str, Any]
Batch = dict[str, np.ndarray]
MakeExample = Callable[[Record, np.random.Generator], Example]

# Records tried in place of a bad one before the pipeline gives up.
MAX_TRIES = 20


def global_order(sources: Sequence[tuple[Source, float]], seed: int) -> grain.MapDataset:
    """The endless sequence of (source number, record index) before it is cut into batches."""
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    parts = [
        grain.MapDataset.range(len(source))
        .shuffle(seed=int(part_seed))
        .repeat()
        .map(WithNumber(number))
        for number, ((source, _), part_seed) in enumerate(zip(sources, seeds, strict=True))
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [weight for _, weight in sources])


@dataclass(frozen=True)
class WithNumber:
    """Puts the number of its source before each index."""

    number: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, index


@dataclass(frozen=True)
class Rows:
    """Which positions of the global order belong to a process."""

    batch_size: int
    process_index: int
    process_count: int

    @property
    def local(self) -> int:
        """Rows of a batch that this process makes."""
        return self.batch_size // self.process_count

    def position(self, index: int) -> int:
        """Place in the global order of the `index`-th row this process makes."""
        batch, row = divmod(index, self.local)
        return batch * self.batch_size + self.process_index * self.local + row


@dataclass(frozen=True)
class LocalOrder:
    """(position, source number, record index) of the rows of one process, from a batch on."""

    order: grain.MapDataset
    rows: Rows
    first_batch: int

    def __len__(self) -> int:
        return sys.maxsize // self.rows.process_count - self.first_batch * self.rows.local

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        position = self.rows.position(self.first_batch * self.rows.local + int(index))
        return position, *self.order[position]


@dataclass(frozen=True)
class LoadExample:
    """Makes the example at a place of the global order, replacing bad records.

    Attributes:
      sources: all of them, by their numbers.
      make_example: see `train_iterator`; with the transforms of the source where it has its own.
      seed: of the generators, which depend on (seed, position) alone.
    """

    sources: tuple[Source, ...]
    make_example: MakeExample
    seed: int

    def __call__(self, place: tuple[int, int, int]) -> Example:
        """place: (position, source number, record index).

        Raises:
          SourceError: `MAX_TRIES` records in a row were bad.
        """
        position, number, index = place
        source = self.sources[number]
        make_example = made_for(source, self.make_example)
        for bad in range(MAX_TRIES):
            try:
                example = make_example(self._record(number, index), self._rng(0, position))
            except BadSample as error:
                logger.warning("skipped a bad record: %s", error)
                last = error
                # Another place altogether: bad records often lie side by side.
                index = int(self._rng(1 + bad, position).integers(len(source)))
                continue
            return {**example, "valid": np.True_, "bad": np.int32(bad)}
        raise SourceError(
            f"{MAX_TRIES} records in a row could not be used; is data.root right, are the images "
            f"where the annotations say? The last one: {last}"
        )

    def _rng(self, purpose: int, position: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(key=self.seed, counter=[0, purpose, position, 0])
        )

    def _record(self, number: int, index: int) -> Record:
        record = self.sources[number][index]
        if len(self.sources) == 1:
            return record
        own = picture_id(record["image_id"], number, len(self.sources))
        return {**record, "image_id": own}


def picture_id(image_id: int, number: int, count: int) -> int:
    """What batches call a picture of source `number` of `count`; below 2**31 for several.

    Pictures of different sources must not pass for the same one.
    """
    if count == 1:
        return image_id
    span = 2**31 // count
    return number * span + image_id % span


def stack(examples: Sequence[Example]) -> Batch:
    """Examples of equal shapes to one batch with a leading axis."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
