"""Sources whose training pictures are transformed in another way than config.data says."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from mplug_jax.data.records import Record, Source
from mplug_jax.data.spelling import nearest
from mplug_jax.data.transforms import ImageTransform

Maker = TypeVar("Maker")

SETTINGS = ("crop_scale", "decoder", "flip", "randaugment")


@dataclass(frozen=True)
class Augmented:
    """A source and what its spec has under `transforms`; the records are the source's.

    Attributes:
      source: the records.
      transforms: settings that replace those of config.data, see `checked_transforms`.
    """

    source: Source
    transforms: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record | dict[str, Any]:
        return self.source[index]

    @property
    def bad_records(self) -> list[tuple[str, str]]:
        """Those of the source, where it tells."""
        return getattr(self.source, "bad_records", [])

    @property
    def left_out(self) -> int:
        """That of the source, where it tells."""
        return getattr(self.source, "left_out", 0)


def checked_transforms(given: Any) -> dict[str, Any]:
    """The `transforms` of a source's spec.

    Args:
      given: a mapping with some of `SETTINGS`, in the meaning that they have in config.data.

    Raises:
      ValueError: an unknown setting (the nearest known one is named), or a value that cannot be.
    """
    # A ConfigDict is no Mapping.
    if not hasattr(given, "items"):
        raise ValueError(f"a source's transforms are {given!r}, not a dict of settings")
    checked = dict(given.items())
    for key in checked:
        if key not in SETTINGS:
            raise ValueError(f"a source's transforms have no {key!r}{nearest(key, SETTINGS)}")
    for key in ("flip", "randaugment"):
        if not isinstance(checked.get(key, True), bool):
            raise ValueError(f"a source's transforms: {key} is {checked[key]!r}, not True or False")
    if (scale := checked.get("crop_scale")) is not None:
        try:
            low, high = scale
            checked["crop_scale"] = (float(low), float(high))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a source's transforms: crop_scale is {scale!r}, not None or two numbers"
            ) from error
    try:
        ImageTransform((1, 1), train=True, **checked)
    except ValueError as error:
        raise ValueError(f"a source's transforms: {error}") from error
    return checked


def made_for(source: Source, make_example: Maker) -> Maker:
    """`make_example` with the transforms that the source has for itself, if it has any.

    Raises:
      ValueError: it has some, but `make_example` is none of this package's makers of examples.
    """
    if not isinstance(source, Augmented):
        return make_example
    transform = getattr(make_example, "transform", None)
    if transform is None:
        raise ValueError(
            f"a source sets transforms {dict(source.transforms)}, but {make_example!r} has no "
            "`transform` whose settings they could replace"
        )
    # Transforms of boxes have fewer settings, in config.data as well.
    known = {field.name for field in fields(transform)}
    own = {key: value for key, value in source.transforms.items() if key in known}
    return replace(make_example, transform=replace(transform, **own))
