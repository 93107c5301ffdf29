"""A folder of pictures to pack, and what the tests of packing share."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from mplug_jax.data.packing.manifest import begin, finish
from mplug_jax.data.packing.shards import (
    Exclusion,
    Job,
    excluded_pictures,
    pack_shard,
    places,
    source_of,
)


def write_pictures(root: Path, count: int = 10) -> None:
    """0.jpg .. below `images`, every third larger than 64 pixels, 5.jpg no picture; rows.jsonl,
    and test.jsonl with a smaller copy of 3.jpg."""
    folder = root / "images"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        cells = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        size = (120, 90) if number % 3 == 0 else (60, 45)
        cells.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
        rows.append({"image": f"{number}.jpg", "captions": [f"picture {number}", "another"]})
    Image.open(folder / "3.jpg").resize((60, 45)).save(folder / "copy.png")
    (folder / "5.jpg").write_text("404")
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {"image": "copy.png", "captions": ["held out"]}
    (root / "test.jsonl").write_text(json.dumps(row))


def spec(name: str) -> str:
    return json.dumps({"kind": "jsonl", "path": f"{name}.jsonl", "images": "images"})


def job_of(root: Path, **changes) -> Job:
    settings = {
        "sources": (spec("rows"),),
        "exclude": (spec("test"),),
        "root": str(root),
        "seed": 0,
        "max_bad_fraction": 0.01,
        "shards": 4,
        "max_side": 64,
        "quality": 90,
        "distance": 3,
    }
    return Job(**(settings | changes))


def pack_here(job: Job, out: Path, count: int) -> list[int]:
    """Packs without Beam, at most `count` shards; returns those that were to be written."""
    todo = begin(job, str(out))
    pictures = [each for n in range(len(job.exclude)) for each in excluded_pictures(job, n, 0, 1)]
    found = defaultdict(list)
    for number in range(len(job.sources)):
        for shard, place in places(job, number, 0, len(source_of(job, number))):
            found[shard].append(place)
    for shard in todo[:count]:
        exclusion = Exclusion.of(pictures, job.distance)
        pack_shard(job, str(out), shard, found[shard][::-1], exclusion)
    return todo


def finished(job: Job, out: Path) -> dict:
    return finish(job, str(out))
