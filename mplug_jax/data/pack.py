"""``python -m mplug_jax.data.pack``: any source as ArrayRecord shards that training reads fast.

    python -m mplug_jax.data.pack --source='{"kind": "webdataset", "path": "cc3m"}' --root=/data \\
        --out=/data/packed/cc3m --exclude='{"kind": "captions", "path": "coco_test.json"}'
    python -m mplug_jax.data.pack --config=configs/pretrain_base.py --config.data.root=/data \\
        --out=/data/packed -- --direct_num_workers=8 --direct_running_mode=multi_processing

What follows ``--`` is Apache Beam's, such as ``--runner=FlinkRunner``. docs/data.md says the rest.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from mplug_jax.data.files import is_remote
from mplug_jax.data.packing.manifest import begin, finish
from mplug_jax.data.packing.shards import Job, source_of
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import MIXTURE_KEYS

# Records of a shard, about: 100 to 400 MB.
PER_SHARD = 4096

_CONFIG = config_flags.DEFINE_config_file("config", None, "Packs each source of its data.train.")
_SOURCE = flags.DEFINE_multi_string("source", [], "Spec in JSON; several go into one folder.")
_OUT = flags.DEFINE_string("out", "", "Folder of the shards, which all workers must see.")
_ROOT = flags.DEFINE_string("root", None, "Where paths of --source and --exclude start from.")
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Spec in JSON of pictures to leave out.")
_DISTANCE = flags.DEFINE_integer("distance", 3, "Bits of 64 that near pictures differ in.", 0, 16)
_SHARDS = flags.DEFINE_integer("shards", 0, "Files; 0: one for 4,096 records.", 0)
_MAX_SIDE = flags.DEFINE_integer("max_side", 640, "Pixels of a picture's longer side.", 16)
_QUALITY = flags.DEFINE_integer("quality", 90, "Of JPEGs made of larger pictures.", 1, 100)


def main(beam_options: Sequence[str]) -> None:
    """Packs what the flags name.

    Raises:
      SourceError, ValueError: a mistake in the flags or the data.
    """
    if not _OUT.value or bool(_SOURCE.value) == (_CONFIG.value is not None):
        raise SourceError("give --out=FOLDER, and --config=FILE or --source=JSON, but not both")
    if is_remote(_OUT.value):
        raise SourceError(f"--out={_OUT.value} is a URL: name a folder that all workers see")
    try:
        pipeline = importlib.import_module("mplug_jax.data.packing.pipeline")
    except ImportError as error:
        raise SourceError(
            f"packing needs Apache Beam, which cannot be imported here ({error}): "
            "pip install 'mplug_jax[pack]', best into an environment of its own"
        ) from error
    train = []
    for out, job, mixing in _jobs():
        todo = begin(job, out)
        print(f"{out}: {len(todo)} of {job.shards} shards to be written", flush=True)
        if todo:
            pipeline.run_pipeline(job, out, todo, beam_options)
        counts = finish(job, out)["counts"]
        print(f"{out}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
        train.append({"kind": "arrayrecord", "path": str(Path(out).absolute()), **mixing})
    print(f"config.data.train = {tuple(train)}")


def _jobs() -> list[tuple[str, Job, dict[str, Any]]]:
    """(folder, job, how the source is mixed in) of each folder to be written."""
    out = _OUT.value
    if _SOURCE.value:
        specs = [_spec(given, "--source") for given in _SOURCE.value]
        return [(out, _job(specs, _ROOT.value, 0, 0.01), {})]
    config = _CONFIG.value
    specs = [dict(spec) for spec in config.data.train]
    if not specs:
        raise SourceError("the config's data.train names no source")
    root = _ROOT.value or config.data.root
    found = []
    for number, spec in enumerate(specs):
        folder = out if len(specs) == 1 else str(Path(out) / f"{number}-{spec['kind']}")
        mixing = {key: spec.pop(key) for key in MIXTURE_KEYS if key in spec}
        job = _job([spec], root, config.seed, config.data.max_bad_fraction)
        found.append((folder, job, mixing))
    return found


def _job(
    specs: Sequence[Mapping[str, Any]], root: str | None, seed: int, max_bad_fraction: float
) -> Job:
    job = Job(
        sources=tuple(map(json.dumps, specs)),
        exclude=tuple(json.dumps(_spec(given, "--exclude")) for given in _EXCLUDE.value),
        root=None if root is None else str(root),
        seed=seed,
        max_bad_fraction=max_bad_fraction,
        shards=_SHARDS.value,
        max_side=_MAX_SIDE.value,
        quality=_QUALITY.value,
        distance=_DISTANCE.value,
    )
    if job.shards:
        return job
    records = sum(len(source_of(job, number)) for number in range(len(specs)))
    return dataclasses.replace(job, shards=max(1, -(-records // PER_SHARD)))


def _spec(given: str, flag: str) -> dict[str, Any]:
    try:
        spec = json.loads(given)
    except ValueError as error:
        raise SourceError(f"{flag}={given} is no JSON: {error}") from error
    if not isinstance(spec, dict):
        raise SourceError(f'{flag}={given} is no JSON object such as \'{{"kind": "jsonl", ...}}\'')
    return spec


def _parsed(argv: Sequence[str]) -> list[str]:
    """absl's parser of flags; a mistake in them, or in the config, is one message."""
    try:
        rest = flags.FLAGS(list(argv))[1:]
    except Exception as error:  # a config file may raise anything
        # It brings jax, as config files do; the workers import neither.
        command_line = importlib.import_module("mplug_jax.command_line")
        _exit(command_line.explanation(argv, error))
    if rest:
        _exit(f"unexpected argument {rest[0]!r}: Beam's options come after --")
    return list(argv[:1])


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run(argv: Sequence[str]) -> None:
    """Runs the command; a user's mistake ends it with one message and exit status 2."""
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, beams = list(argv[:cut]), list(argv[cut + 1 :])

    def start(_: Sequence[str]) -> None:
        try:
            main(beams)
        except ValueError as error:
            # Of others a traceback says more: they are no mistake of the user's.
            if isinstance(error, SourceError) or type(error) is ValueError:
                _exit(str(error))
            raise

    app.run(start, argv=ours, flags_parser=_parsed)


if __name__ == "__main__":
    run(sys.argv)
