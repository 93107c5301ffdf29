"""What is packed, where each record goes, and how a shard is written.

A record's shard is a function of its id, and the order within a shard is that of the sources, so
the files do not depend on how many workers write them. Nothing of a shard has its final name before
all of it is there: the shard first, then its *part*, which says what the shard holds.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from mplug_jax.data.files import write_whole
from mplug_jax.data.packing.hashes import HashIndex, difference_hash
from mplug_jax.data.packing.images import packed_picture
from mplug_jax.data.records import BadSample, Record, Source
from mplug_jax.data.sources import build_source
from mplug_jax.data.sources.array_records import encode_record

# (name, number of the source, index in it) of a record.
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Job:
    """Everything that decides what is written.

    Attributes:
      sources: specs as JSON, packed into one folder.
      exclude: specs as JSON of pictures that must not be in it.
      root: config.data.root.
      seed: of sources that draw.
      max_bad_fraction: config.data.max_bad_fraction.
      shards: how many files.
      max_side: pixels of a picture's longer side.
      quality: of the JPEGs made of larger ones.
      distance: bits in which the hash of a picture may differ from an excluded one's.
    """

    sources: tuple[str, ...]
    exclude: tuple[str, ...]
    root: str | None
    seed: int
    max_bad_fraction: float
    shards: int
    max_side: int
    quality: int
    distance: int

    def settings(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    def shard_name(self, shard: int) -> str:
        """As the `arrayrecord` source looks for them."""
        return f"data.array_record-{shard:05}-of-{self.shards:05}"


@dataclass(frozen=True)
class Exclusion:
    """The pictures that must not be packed: by id, and by their hashes."""

    ids: frozenset[str]
    hashes: HashIndex

    @classmethod
    def of(cls, pictures: Iterable[tuple[str, int | None]], distance: int) -> "Exclusion":
        """Of (id, hash or None) pairs."""
        pictures = list(pictures)
        hashes = (value for _, value in pictures if value is not None)
        return cls(frozenset(name for name, _ in pictures), HashIndex(hashes, distance))

    def reason(self, name: str, hashed: int | None) -> str | None:
        """Why a picture is left out, if it is."""
        if plain_id(name) in self.ids:
            return "excluded: its id is that of an excluded picture"
        if hashed is not None and self.hashes.near(hashed):
            return "excluded: looks like an excluded picture"
        return None


def plain_id(name: str) -> str:
    """The id without the "#2" that tells records of the same picture apart."""
    front, mark, number = name.rpartition("#")
    return front if mark and number.isdecimal() else name


def shard_of(name: str, shards: int) -> int:
    """The shard of a record, by the hash of its id."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % shards


# Kept by each worker process: building a source may mean reading gigabytes of JSON.
@functools.cache
def opened(spec: str, root: str | None, seed: int, max_bad_fraction: float) -> Source:
    """The source of a spec in JSON; raises as `build_source`."""
    return build_source(json.loads(spec), root, seed, max_bad_fraction)


def source_of(job: Job, number: int, excluded: bool = False) -> Source:
    """One of the job's sources, or of those whose pictures are excluded."""
    spec = (job.exclude if excluded else job.sources)[number]
    return opened(spec, job.root, job.seed, job.max_bad_fraction)


def places(job: Job, number: int, start: int, stop: int) -> Iterator[tuple[int, Place]]:
    """(shard, place) of the records from `start` to `stop` of a source."""
    source = source_of(job, number)
    for index in range(start, stop):
        try:
            name = source[index]["id"]
        except BadSample:  # its reason goes into the report when the shard is written
            name = f"record {index} of source {number}"
        yield shard_of(name, job.shards), (name, number, index)


def excluded_pictures(
    job: Job, number: int, start: int, stop: int
) -> Iterator[tuple[str, int | None]]:
    """(id, hash) of the pictures of an excluded source; unreadable ones have only an id."""
    source = source_of(job, number, excluded=True)
    for index in range(start, stop):
        try:
            record = source[index]
        except BadSample:
            continue
        try:
            _, pixels = packed_picture(record["image"], job.max_side, job.quality)
            yield plain_id(record["id"]), difference_hash(pixels)
        except BadSample:
            yield plain_id(record["id"]), None


def pack_shard(
    job: Job, out: str, shard: int, found: Iterable[Place], exclusion: Exclusion
) -> Counter[str]:
    """Writes a shard and its part; a shard without records is no file. Returns the part's counts.

    Raises:
      OSError: the folder cannot be written.
    """
    counts: Counter[str] = Counter()
    dropped: list[dict[str, str]] = []
    path = Path(out) / job.shard_name(shard)

    def write(unfinished: str) -> None:
        writer = ArrayRecordWriter(unfinished, "group_size:1")
        for name, kind, content in _contents(job, sorted(found, key=lambda p: p[1:]), exclusion):
            counts[kind] += 1
            if isinstance(content, bytes):
                writer.write(content)
            else:
                dropped.append({"id": name, **content})
        writer.close()

    write_whole(path, write)
    checksum = None
    if counts["packed"]:
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        path.unlink()
    part = {"counts": dict(counts), "sha256": checksum, "dropped": dropped}
    content = json.dumps(part, ensure_ascii=True)
    write_whole(part_file(out, shard), lambda unfinished: Path(unfinished).write_text(content))
    return counts


def part_file(out: str, shard: int) -> Path:
    """Where a finished shard says what it holds, until all are finished."""
    return Path(out) / "parts" / f"{shard:05}.json"


def _contents(
    job: Job, found: Iterable[Place], exclusion: Exclusion
) -> Iterator[tuple[str, str, bytes | dict[str, str]]]:
    """(id, what became of it, the encoded record or path and reason) of each place."""
    seen: set[str] = set()
    for name, number, index in found:
        path = ""
        try:
            record = source_of(job, number)[index]
            path = record["image"] if isinstance(record["image"], str) else ""
            if name in seen:
                yield name, "duplicate", {"path": path, "reason": "duplicate: the id came before"}
                continue
            record, reason = _packed(job, number, record, exclusion)
            if reason is None:
                content = encode_record(record)
        except BadSample as error:
            yield name, "bad", {"path": path, "reason": str(error)}
            continue
        seen.add(name)
        if reason is None:
            yield name, "packed", content
        else:
            yield name, "excluded", {"path": path, "reason": reason}


def _packed(
    job: Job, number: int, record: Record, exclusion: Exclusion
) -> tuple[Mapping[str, Any], str | None]:
    """The record as it is packed, and why it must not be."""
    if "video" in record:
        raise BadSample(f"{record['id']}: is a clip; shards hold pictures only")
    image, pixels = packed_picture(record["image"], job.max_side, job.quality)
    reason = exclusion.reason(record["id"], difference_hash(pixels))
    packed = {**record, "image": image}
    if "pair" in record:
        pair = record["pair"]
        other, pixels = packed_picture(pair["image2"], job.max_side, job.quality)
        packed["pair"] = {**pair, "image2": other}
        reason = reason or exclusion.reason(record["id"], difference_hash(pixels))
    if len(job.sources) > 1:
        # Pictures of different sources must not pass for the same one.
        span = 2**31 // len(job.sources)
        packed["image_id"] = number * span + record["image_id"] % span
    return packed, reason
