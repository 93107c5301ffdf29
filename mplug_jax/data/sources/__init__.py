"""Data sources by name: what `data.train` and the evaluators of a config turn into."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mplug_jax.data.augmented import Augmented, checked_transforms
from mplug_jax.data.records import Source
from mplug_jax.data.sources.array_records import array_records
from mplug_jax.data.sources.json_files import json_records
from mplug_jax.data.sources.refer import refer_records
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.sources.tar_files import tar_records
from mplug_jax.data.sources.tfds_source import tfds_records
from mplug_jax.data.sources.video import video_records
from mplug_jax.data.spelling import nearest


@dataclass(frozen=True)
class SourceKind:
    """A kind of source: its constructor and the keys of a spec, beside `kind`."""

    build: Callable[..., Source]
    required: frozenset[str]
    optional: frozenset[str]
    reads_files: bool = True


def _json_kind(name: str, *optional: str) -> SourceKind:
    build = functools.partial(json_records, kind=name)
    return SourceKind(
        build, frozenset({"path"}), frozenset({"images", "max_bad_fraction", *optional})
    )


KINDS: dict[str, SourceKind] = {
    "scenes": SourceKind(
        Scenes,
        frozenset({"level", "split"}),
        frozenset({"size", "fields", "seed", "cache", "max_objects", "video", "sized"}),
        reads_files=False,
    ),
    "captions": _json_kind("captions", "split"),
    "retrieval": _json_kind("retrieval", "split"),
    "vqa": _json_kind("vqa", "annotations", "image_name", "labels"),
    "grounding": _json_kind("grounding", "box_format"),
    "nlvr2": _json_kind("nlvr2"),
    "snli_ve": _json_kind("snli_ve"),
    "jsonl": _json_kind("jsonl"),
    "refer": SourceKind(
        refer_records,
        frozenset({"path", "instances"}),
        frozenset({"images", "split", "max_bad_fraction"}),
    ),
    "video": SourceKind(
        video_records, frozenset({"path"}), frozenset({"videos", "extension", "max_bad_fraction"})
    ),
    "webdataset": SourceKind(tar_records, frozenset({"path"}), frozenset({"max_bad_fraction"})),
    "arrayrecord": SourceKind(array_records, frozenset({"path"}), frozenset()),
    "tfds": SourceKind(
        tfds_records,
        frozenset({"split"}),
        frozenset({"path", "name", "data_dir", "image", "caption", "image_id"}),
    ),
}

# Keys of a spec in config.data.train that say how the source is mixed in, not what it is.
MIXTURE_KEYS = ("weight", "transforms")


def build_source(
    spec: Mapping[str, Any],
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
) -> Source:
    """The source a spec describes.

    Args:
      spec: `{"kind": "scenes", "level": "easy", "split": "train"}`, or `{"kind": "captions",
        "path": "train.json", "images": "images"}` and the like; keys whose value is None count as
        absent. `docs/data.md` lists kinds and keys.
      root: config.data.root, which relative paths are joined with; a folder or a URL.
      seed: of the scenes, unless the spec has its own.
      max_bad_fraction: config.data.max_bad_fraction, unless the spec has its own.

    Raises:
      ValueError: an unknown kind or key (the nearest known one is named), or a missing key.
      SourceError: files are missing or unusable.
    """
    given = {key: value for key, value in spec.items() if value is not None}
    name = given.pop("kind", None)
    if name not in KINDS:
        raise ValueError(f"unknown kind of data source {name!r}{nearest(name, KINDS)}")
    kind = KINDS[name]
    known = kind.required | kind.optional
    for key in given:
        if key not in known:
            raise ValueError(f"a {name!r} source has no key {key!r}{nearest(key, known)}")
    missing = sorted(kind.required - given.keys())
    if missing:
        raise ValueError(f"a {name!r} source needs {' and '.join(map(repr, missing))}: {given}")
    if not kind.reads_files:
        return kind.build(**{"seed": seed, **given})
    if "max_bad_fraction" in known:
        given.setdefault("max_bad_fraction", max_bad_fraction)
    return kind.build(root=root, **given)


def build_mixture(
    specs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
) -> list[tuple[Source, float]]:
    """The training sources of one spec or several, each with its `weight`, for `train_iterator`.

    A weight is a share of the examples relative to the others'; a source without one counts with
    its number of records, so that a mixture without weights is the sources put together. Weights
    are given for all sources or for none. `transforms` of a spec replace those of config.data for
    that source (`mplug_jax.data.augmented`).

    Raises:
      ValueError: as `build_source` and `checked_transforms`, or weights that are not positive or
        given for some only.
    """
    # A ConfigDict is no Mapping, so it is lists that are told apart.
    listed = list(specs) if isinstance(specs, Sequence) else [specs]
    weights = [spec.get("weight") for spec in listed]
    given = [weight for weight in weights if weight is not None]
    if given and (len(given) < len(weights) or not all(weight > 0 for weight in given)):
        raise ValueError(f"give each training source a positive weight, or none: {weights}")
    transforms = [
        None if (own := spec.get("transforms")) is None else checked_transforms(own)
        for spec in listed
    ]
    sources = [
        build_source(
            {key: value for key, value in spec.items() if key not in MIXTURE_KEYS},
            root,
            seed,
            max_bad_fraction,
        )
        for spec in listed
    ]
    return [
        (
            source if own is None else Augmented(source, own),
            float(len(source) if weight is None else weight),
        )
        for source, weight, own in zip(sources, weights, transforms, strict=True)
    ]
