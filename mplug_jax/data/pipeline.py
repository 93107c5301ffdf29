"""From sources to batches: Grain pipelines for training, plain iteration for evaluation.

Which record lies where in training depends on (seed, epoch, index) alone: not on the number of
worker processes or threads, not on the number of training processes, not on timing. The iterator's
state is therefore one number, the batches drawn so far, and may be restored under any other number
of workers or processes.
"""

import importlib.machinery
import logging
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from mplug_jax.data.loading import (
    MAX_TRIES,
    Batch,
    Example,
    LoadExample,
    LocalOrder,
    MakeExample,
    Rows,
    global_order,
    stack,
)
from mplug_jax.data.records import BadSample, Source, SourceError

logger = logging.getLogger(__name__)

# Batches made ahead: by each worker process, or by the threads of the training process.
BATCHES_AHEAD = 2


def train_iterator(
    sources: Sequence[tuple[Source, float]],
    make_example: MakeExample,
    *,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> "TrainIterator":
    """Endless batches for training.

    Each source is shuffled anew every epoch and repeated; several are interleaved in proportion to
    their weights (`grain.MapDataset.mix`). A record that raises BadSample is logged and replaced
    by another of its source, drawn from (seed, position), and counted in `bad`.

    Args:
      sources: (source, weight) pairs.
      make_example: makes an example of a record; picklable, and without jax, when workers > 0. A
        source with transforms of its own (`Augmented`) gets its examples with those.
      seed: of the order and of the generators handed to `make_example`.
      batch_size: examples of the global batch, over all processes.
      process_index: this process; it gets rows `[process_index * b, (process_index + 1) * b)` of
        each global batch, with b = batch_size / process_count.
      process_count: training processes.
      workers: worker processes; 0 makes the batches in threads of this process.
      threads: of this process when workers is 0, of each worker otherwise; 0 makes each batch when
        it is asked for.

    Returns:
      A Grain iterator of batches: the example's arrays stacked to [b, ...], with `valid` bool [b]
      (always True) and `bad` int32 [b] (records skipped to reach this one).

    Raises:
      ValueError: a batch size that the processes do not divide, a weight that is not positive, ...
      SourceError: an empty source; while iterating, `MAX_TRIES` bad records in a row.
    """
    _check_request(sources, seed, batch_size, process_index, process_count, workers, threads)
    load = LoadExample(tuple(source for source, _ in sources), make_example, seed)
    return TrainIterator(
        order=global_order(sources, seed),
        load=load,
        rows=Rows(batch_size, process_index, process_count),
        workers=workers,
        threads=threads,
        signature={
            "seed": seed,
            "batch_size": batch_size,
            "sources": [[len(source), float(weight)] for source, weight in sources],
        },
    )


def _check_request(
    sources: Sequence[tuple[Source, float]],
    seed: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    workers: int,
    threads: int,
) -> None:
    if not sources:
        raise SourceError("there is no training source")
    for source, weight in sources:
        if not len(source):
            raise SourceError(f"a training source is empty: {source!r}")
        if not weight > 0:
            raise ValueError(f"the weight of a training source must be positive, not {weight!r}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    if workers < 0 or threads < 0 or not 0 <= seed < 2**32:
        raise ValueError("workers and threads must not be negative, seed in 0 .. 2**32 - 1")


class TrainIterator(grain.DatasetIterator):
    """What `train_iterator` returns; Orbax saves and restores it as any Grain iterator.

    State (JSON): `next_batch`, the global batches drawn so far, beside seed, batch size, lengths
    and weights of the sources, which a restore compares with its own and warns about.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        load: LoadExample,
        rows: Rows,
        workers: int,
        threads: int,
        signature: Mapping[str, Any],
    ):
        super().__init__()
        self._order, self._load, self._rows = order, load, rows
        self._workers, self._threads = workers, threads
        self._signature = dict(signature)
        self._next_batch = 0
        self._running: list[grain.DatasetIterator] = []  # the pipeline, once it runs
        # Also at interpreter exit: Grain's own clean-up comes too late then.
        weakref.finalize(self, _stop, self._running)

    def _open(self) -> grain.DatasetIterator:
        """The running pipeline, started at the next batch if need be."""
        self._assert_not_closed()
        if not self._running:
            local = LocalOrder(self._order, self._rows, self._next_batch)
            dataset = (
                grain.MapDataset.source(local)
                .map(self._load)
                .batch(self._rows.local, batch_fn=stack)
                .to_iter_dataset(grain.ReadOptions(self._threads, BATCHES_AHEAD))
            )
            if self._workers:
                keep_workers_light()
                dataset = dataset.mp_prefetch(
                    grain.MultiprocessingOptions(self._workers, BATCHES_AHEAD)
                )
            self._running.append(iter(dataset))
        return self._running[0]

    def __next__(self) -> Batch:
        batch = next(self._open())
        self._next_batch += 1
        if self._workers:
            # Out of shared memory, which Grain frees only once nothing refers to the arrays.
            batch = {key: np.array(value, subok=False) for key, value in batch.items()}
        return batch

    def first_example(self) -> Example:
        """The very first example, for its shapes; the iterator does not move."""
        return self._load(LocalOrder(self._order, self._rows, 0)[0])

    def get_state(self) -> dict[str, Any]:
        """What is needed to go on after the batches drawn so far; the same on all processes."""
        return {"next_batch": self._next_batch, **self._signature}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which may come from other numbers of workers and processes."""
        for key, now in self._signature.items():
            if state[key] != now:
                logger.warning(
                    "the data iterator was saved with %s = %s, now it is %s: the order of "
                    "examples is not the one the run began with",
                    key,
                    state[key],
                    now,
                )
        _stop(self._running)
        self._next_batch = int(state["next_batch"])

    def start_prefetch(self) -> None:
        """Starts making batches ahead of the first `next`."""
        self._open().start_prefetch()

    def close(self) -> None:
        """Ends worker processes and threads; the iterator cannot be used afterwards."""
        self._closed = True
        _stop(self._running)

    def __str__(self) -> str:
        return f"TrainIterator(next_batch={self._next_batch})"


def _stop(running: list[grain.DatasetIterator]) -> None:
    """Ends and forgets the pipeline, if one runs."""
    while running:
        running.pop().close()


def keep_workers_light() -> None:
    """Lets spawned processes run `mplug_jax.data.worker` where they would re-run our main script.

    `multiprocessing` runs the parent's main module again in every process it spawns, so that
    functions defined there can be unpickled. The training script imports jax, and a script without
    an `if __name__ == "__main__"` guard would train again. Nothing the workers unpickle is defined
    in a main script by reference (Grain pickles such things by value), so the module's name in
    `__main__.__spec__`, which is what the spawned process goes by, is replaced.

    Grain also reads absl flags when it starts workers; programs that parse none are marked as
    having parsed them.
    """
    sys.modules["__main__"].__spec__ = importlib.machinery.ModuleSpec("mplug_jax.data.worker", None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class BadBudget:
    """Counts bad records over the batches of a run and says when there are too many.

    Attributes:
      max_fraction: bad records tolerated among all records read.
      seen: records read so far, bad ones included.
      bad: bad ones among them.
    """

    MIN_SEEN = 100

    def __init__(self, max_fraction: float):
        if not 0.0 <= max_fraction <= 1.0:
            raise ValueError(f"data.max_bad_fraction must lie in [0, 1], not {max_fraction}")
        self.max_fraction = max_fraction
        self.seen = 0
        self.bad = 0

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts a batch of `train_iterator`.

        Raises:
          SourceError: more than `max_fraction` of at least `MIN_SEEN` records were bad. (That none
            can be read shows at once: `train_iterator` then raises by itself.)
        """
        bad = int(np.sum(batch["bad"]))
        self.bad += bad
        self.seen += int(np.sum(batch["valid"])) + bad
        if self.seen >= self.MIN_SEEN and self.bad > self.max_fraction * self.seen:
            raise SourceError(
                f"{self.bad} of the {self.seen} records read could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction} allows; the warnings above name each"
            )


def eval_batches(
    source: Source,
    make_example: MakeExample,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> Iterator[Batch]:
    """All records of a source once, in order, in batches of one shape.

    Args:
      source: what to iterate over.
      make_example: `(record, rng) -> example`; `rng` depends on the record's index alone.
      batch_size: rows of the global batch; each process gets batch_size / process_count of them,
        and all processes get the same number of batches.
      limit: only the first `limit` records.
      process_index: this process.
      process_count: evaluating processes.
      threads: how many threads make examples.

    Yields:
      The example's arrays stacked, `valid` bool [b] and `index` int32 [b], the record's place in
      the source. Rows after the last record, and those of records that raise BadSample (which is
      logged), hold zeros and valid=False; `index` is -1 in the former.

    Raises:
      ValueError: a batch size that the processes do not divide.
      SourceError: nothing to evaluate, or a first batch without a single usable record.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    count = len(source) if limit is None else min(limit, len(source))
    if count < 1:
        raise SourceError(f"there is nothing to evaluate in {source!r} (limit={limit})")
    rows = Rows(batch_size, process_index, process_count)
    load = _LoadForEval(source, make_example)
    return _eval_batches(load, rows, count, threads)


@dataclass(frozen=True)
class _LoadForEval:
    """The example of an index, or None where its record is bad."""

    source: Source
    make_example: MakeExample

    def __call__(self, index: int) -> Example | None:
        rng = np.random.Generator(np.random.Philox(key=0, counter=[0, 0, index, 0]))
        try:
            return self.make_example(self.source[index], rng)
        except BadSample as error:
            logger.warning("left a bad record out of the evaluation: %s", error)
            return None


def _eval_batches(load: _LoadForEval, rows: Rows, count: int, threads: int) -> Iterator[Batch]:
    blank: Example | None = None
    bad = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="eval-examples") as pool:
        for indices, futures in _ahead(pool, load, rows, count):
            examples = [None if future is None else future.result() for future in futures]
            if blank is None:
                blank = _blank(load, examples, count)
            bad += sum(e is None and i >= 0 for e, i in zip(examples, indices, strict=True))
            batch = stack([blank if example is None else example for example in examples])
            batch["valid"] = np.array([example is not None for example in examples])
            batch["index"] = np.array(indices, np.int32)
            yield batch
    if bad:
        logger.warning("%d of %d records were left out of the evaluation", bad, count)


def _ahead(
    pool: ThreadPoolExecutor, load: _LoadForEval, rows: Rows, count: int
) -> Iterator[tuple[list[int], list[Future[Example | None] | None]]]:
    """Each batch's indices (-1: padding) and pending examples, some batches ahead."""
    pending: deque[tuple[list[int], list[Future[Example | None] | None]]] = deque()
    for batch in range(-(-count // rows.batch_size)):
        places = [rows.position(batch * rows.local + row) for row in range(rows.local)]
        indices = [place if place < count else -1 for place in places]
        pending.append((indices, [pool.submit(load, i) if i >= 0 else None for i in indices]))
        if len(pending) > BATCHES_AHEAD:
            yield pending.popleft()
    yield from pending


def _blank(load: _LoadForEval, examples: Sequence[Example | None], count: int) -> Example:
    """An example of zeros, shaped like a good one of this batch or of the first records."""
    good = next((example for example in examples if example is not None), None)
    candidates = iter(range(min(count, MAX_TRIES)))
    while good is None:
        index = next(candidates, None)
        if index is None:
            raise SourceError("none of the first records can be used, see the warnings above")
        good = load(index)
    return {key: np.zeros_like(value) for key, value in good.items()}
