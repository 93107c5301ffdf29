"""What the data of a config looks like: ``python -m mplug_jax.data.inspect --config=FILE``.

Prints how many records and texts every training and held-out source has, which pictures are in
both, how long the texts are against what the model takes, what cannot be used, and how fast one
thread loads. ``--out=report.html`` writes the same into one file, with training examples drawn as
the model gets them. Nothing is trained, and nothing else is written.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mplug_jax.command_line import run_inspection
from mplug_jax.config import ConfigError, config_errors
from mplug_jax.data.examples import Example, load_image
from mplug_jax.data.inspection.overlaps import fingerprints, path_overlaps, pixel_overlaps
from mplug_jax.data.inspection.pages import as_html, as_text
from mplug_jax.data.inspection.report import Findings, report
from mplug_jax.data.inspection.samples import ReadBack, sample
from mplug_jax.data.inspection.survey import NamedSource, Room, survey
from mplug_jax.data.sources import build_source
from mplug_jax.data.task_examples import EntailmentExamples, prompt_ids
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.tasks import build_task
from mplug_jax.validation import validate

# What is done unless a flag says otherwise: records loaded of each source, and compared by pixels.
SAMPLES, HASHED = 64, 500
# Examples drawn of each training source.
SHOWN = 16


def inspect(
    config: ConfigDict, workdir: str, samples: int = SAMPLES, hashed: int = HASHED, records: int = 0
) -> Findings:
    """Reads the sources of a config.

    Args:
      config: of any task.
      workdir: where the tokenizer is, or is trained into.
      samples: records of each source that are loaded.
      hashed: records of each source whose pixels are compared; 0 compares none.
      records: records of each source that are read for their texts; see ``survey``.

    Raises:
      ConfigError, SourceError, CheckpointError: a mistake in the config or the data. Bad records
        are none: they are reported, however many there are.
    """
    validate(config)
    with config_errors():
        patient = _patient(config)
        task = build_task(patient, workdir)
        named = [*_training(config, task), *_held_out(config, patient)]
    tokenizer, seed = task.setup.tokenizer, config.seed
    rooms = _rooms(config, tokenizer)
    show = ReadBack(tokenizer, rooms, _labels(task.make_example))
    resized = functools.partial(
        _picture, ImageTransform(task.setup.image_size), task.setup.model_config.frames
    )
    count = len(task.sources)
    # First: what follows would leave the files in memory, and loading would look fast.
    sampled = [sample(s, task.make_example, samples, seed, show, SHOWN) for s in named[:count]]
    sampled += [sample(source, resized, samples, seed) for source in named[count:]]
    surveys = [survey(source, tokenizer, rooms, records) for source in named]
    prints = [fingerprints(source, hashed) for source in named] if hashed else []
    overlaps = path_overlaps(surveys[:count], surveys[count:])
    overlaps += pixel_overlaps(prints[:count], prints[count:])
    return Findings(surveys, sampled, prints, overlaps, rooms)


def _patient(config: ConfigDict) -> ConfigDict:
    """The config with sources that put up with any number of bad records, and with pictures."""
    patient = ConfigDict(config.to_dict())
    patient.data.max_bad_fraction = 1.0
    patient.data.train = tuple(
        {key: value for key, value in spec.items() if key != "max_bad_fraction"}
        for spec in config.data.train
    )
    if config.data.cached_variants:
        # What the frozen encoder sees of them: each as it is, and the second mirrored.
        plain = {"cached_variants": 0, "crop_scale": None, "randaugment": False}
        patient.data.update({**plain, "flip": config.data.cached_variants > 1})
    return patient.lock()


def _training(config: ConfigDict, task: Any) -> list[NamedSource]:
    return [
        NamedSource(f"data.train[{i}]", source, spec, False, _allowed(spec, config))
        for i, ((source, _), spec) in enumerate(zip(task.sources, config.data.train, strict=True))
    ]


def _held_out(config: ConfigDict, patient: ConfigDict) -> list[NamedSource]:
    """The evaluators' sources; one that several read is named after all of them."""
    specs: list[dict[str, Any]] = []
    names: list[list[str]] = []
    for name, settings in config.evals.items():
        spec = dict(settings.source)
        if spec not in specs:
            specs.append(spec)
            names.append([])
        names[specs.index(spec)].append(f"evals.{name}")
    named = []
    for spec, evaluators in zip(specs, names, strict=True):
        plain = {key: value for key, value in spec.items() if key != "max_bad_fraction"}
        source = build_source(plain, config.data.root, config.seed, patient.data.max_bad_fraction)
        allowed = _allowed(spec, config)
        named.append(NamedSource(", ".join(evaluators), source, spec, True, allowed))
    return named


def _allowed(spec: Mapping[str, Any], config: ConfigDict) -> float:
    given = spec.get("max_bad_fraction")
    return config.data.max_bad_fraction if given is None else given


def _rooms(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Room]:
    """The tokens that the task has for each kind of text it reads."""
    data = config.data
    text = Room(data.text_length, "data.text_length")
    target = Room(data.target_length, "data.target_length")
    if config.task in ("caption", "scst"):
        # A prompt that does not start with [CLS], which every length counts.
        prompt = len(prompt_ids(tokenizer, config.finetune.caption.prompt)) - 1
        return {"captions": Room(target.tokens, target.setting, prompt)}
    return {
        "vqa": {"questions": text, "answers": target},
        "grounding": {"phrases": text},
        "nlvr2": {"sentences": text},
        "snli_ve": {"hypotheses": text},
    }.get(config.task, {"captions": text})


def _labels(make_example: Any) -> tuple[str, ...]:
    if isinstance(make_example, EntailmentExamples):
        return tuple(make_example.labels)
    return ("false", "true")


def _picture(
    transform: ImageTransform, frames: int, record: Mapping[str, Any], rng: np.random.Generator
) -> Example:
    return {"image": load_image(record, transform, rng, frames)}


def main(config: ConfigDict, given: Mapping[str, str]) -> None:
    """Prints the report, and writes it into ``--out``.

    Raises:
      ConfigError: a flag that cannot be; and as ``inspect``.
    """
    samples = _number("samples", given["samples"], SAMPLES)
    records = _number("records", given["records"], 0)
    hashed = _number("hash", given["hash"], HASHED)
    out = Path(given["out"]) if given["out"] else None
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out={out}: give the name of a file in a folder that exists.")
    if given["workdir"] and not Path(given["workdir"]).is_dir():
        raise ConfigError(f"--workdir={given['workdir']}: there is no such folder.")
    # Every bad record is in the report.
    logging.getLogger("mplug_jax.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        findings = inspect(config, given["workdir"] or folder, samples, hashed, records)
    title, sections = f"The data of {given['config']}", report(findings)
    print(as_text(title, sections), end="")
    if out is None:
        print("\n--out=report.html writes this with the samples drawn.")
        return
    try:
        out.write_text(as_html(title, sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written: {error.strerror}.") from error
    print(f"\n{out}")


def _number(name: str, given: str, default: int) -> int:
    """A number of records; 'all' is one that no source reaches."""
    if given in ("", "all"):
        return int(1e18) if given else default
    if not given.isdecimal():
        raise ConfigError(f"--{name}={given} is no number of records: give one, or 'all'.")
    return int(given)


if __name__ == "__main__":
    run_inspection(main)
