"""Packing as a pipeline of Apache Beam, on one machine or on a cluster.

Only ids and excluded hashes move between workers. Each shard is one piece of work: its worker reads
the records, decodes and hashes their pictures, and writes the file. So more shards than workers are
wanted, and the pictures never lie in memory together.
"""

from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from mplug_jax.data.packing.shards import (
    Exclusion,
    Job,
    Place,
    excluded_pictures,
    pack_shard,
    places,
    source_of,
)

# Records whose ids a worker looks up at a time.
CHUNK = 1000


def run_pipeline(job: Job, out: str, todo: Sequence[int], options: Sequence[str]) -> None:
    """Writes the shards `todo` of a job into a folder that all workers see.

    Args:
      job: what to pack.
      out: the folder.
      todo: numbers of the shards.
      options: flags of Beam, such as `--runner=FlinkRunner`.

    Raises:
      Whatever a runner makes of an error in a worker.
    """
    wanted = frozenset(todo)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        exclusion = (
            pipeline
            | "excluded sources" >> beam.Create(list(_chunks(job, excluded=True)))
            | "to all workers, excluded" >> beam.Reshuffle()
            | "hash" >> beam.FlatMap(lambda chunk: excluded_pictures(job, *chunk))
            | "together" >> beam.combiners.ToList()
            | "index" >> beam.Map(Exclusion.of, job.distance)
        )
        found = (
            pipeline
            | "sources" >> beam.Create(list(_chunks(job, excluded=False)))
            | "to all workers" >> beam.Reshuffle()
            | "ids" >> beam.FlatMap(lambda chunk: places(job, *chunk))
            | "unfinished" >> beam.Filter(lambda keyed: keyed[0] in wanted)
        )
        # A shard that no record falls to is finished, too.
        every = pipeline | "shards" >> beam.Create([(shard, None) for shard in todo])
        _ = (
            (found, every)
            | beam.Flatten()
            | beam.GroupByKey()
            | "write" >> beam.Map(_write, job, out, beam.pvalue.AsSingleton(exclusion))
        )


def _chunks(job: Job, excluded: bool) -> Iterator[tuple[int, int, int]]:
    """(number of the source, first record, end) of pieces of all sources."""
    for number in range(len(job.exclude if excluded else job.sources)):
        size = len(source_of(job, number, excluded))
        for start in range(0, size, CHUNK):
            yield number, start, min(start + CHUNK, size)


def _write(
    keyed: tuple[int, Iterable[Place | None]], job: Job, out: str, exclusion: Exclusion
) -> int:
    shard, found = keyed
    pack_shard(job, out, shard, [place for place in found if place is not None], exclusion)
    return shard
