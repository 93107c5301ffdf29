"""Data sets that TensorFlow Datasets has built, read without TensorFlow."""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mplug_jax.data.files import RemotePath
from mplug_jax.data.records import BadSample, Record, SourceError
from mplug_jax.data.sources.drafts import integer
from mplug_jax.data.sources.file_records import under_root


class TfdsRecords:
    """Records of a TFDS split; pictures stay encoded.

    Args:
      data: the split, by index.
      name: what the records' ids begin with.
      image, caption, image_id: names of features, as `tfds_records` takes them.

    Raises:
      SourceError: no records, or the first cannot be used.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        name: str,
        image: str,
        caption: str,
        image_id: str | None = None,
    ):
        self._data, self._name = data, name
        self._image, self._caption, self._image_id = image, caption, image_id
        if not len(data):
            raise SourceError(f"{name}: no records")
        try:
            self[0]
        except BadSample as error:
            raise SourceError(f"{error}; choose other features, or build the data again") from error

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"TfdsRecords({self._name!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample where a record is damaged, or has no caption or no usable image id."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        name = f"{self._name}/{index}"
        try:
            example = self._data[int(index)]
        except Exception as error:  # of ArrayRecord's reader, of TFDS' parser and decoders
            raise BadSample(f"{name}: cannot be read: {error}") from error
        captions = [text for text in _texts(_feature(example, self._caption)) if text]
        if not captions:
            raise BadSample(f"{name}: {self._caption!r} holds no text")
        number = int(index)
        if self._image_id is not None:
            given = _feature(example, self._image_id)
            number = integer(given.item() if isinstance(given, np.generic) else given)
            if number is None:
                raise BadSample(f"{name}: {self._image_id!r} is {given!r:.60}, no usable image_id")
        picture = _feature(example, self._image)
        return {"id": name, "image": picture, "image_id": number, "captions": captions}


def tfds_records(
    path: str | os.PathLike[str],
    split: str,
    root: str | os.PathLike[str] | None = None,
    image: str = "image",
    caption: str = "caption",
    image_id: str | None = None,
) -> TfdsRecords:
    """The records of a data set that TFDS has built in a format of random access.

    Args:
      path: folder of one version, such as `tensorflow_datasets/coco_captions/2014/1.1.0`; joined
        with `root` where relative.
      split: a split or a part of one: "train", "train[:90%]".
      root: config.data.root.
      image: name of the feature that holds the picture.
      caption: that of the caption or captions; "captions/text" is `text` of each of `captions`.
      image_id: that of a whole number, equal for records of the same picture; without it every
        record counts as another picture.

    Raises:
      SourceError: the folder is none of TFDS', has no such split or feature, was built in a format
        without random access, or as `TfdsRecords`.
    """
    folder = under_root(path, root, "folder")
    if isinstance(folder, RemotePath):
        raise SourceError(f"{folder}: TFDS folders are read from local disks only; copy it to one")
    # Half a second and some memory in every worker, which only those pay who use it.
    tfds = importlib.import_module("tensorflow_datasets")
    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:  # of TFDS: missing, damaged or foreign files
        raise SourceError(
            f"{folder}: is no data set that TFDS has built: {error}; `path` is the folder of one "
            "version, which holds dataset_info.json and features.json"
        ) from error
    features = builder.info.features
    for key, name in (("image", image), ("caption", caption), ("image_id", image_id)):
        if name is not None and not _has(features, name):
            raise SourceError(
                f"{folder}: has no feature {name!r} (the source's {key!r}); it has "
                f"{', '.join(features)}"
            )
    if not isinstance(_feature(features, image), tfds.features.Image):
        raise SourceError(f"{folder}: the feature {image!r} is no Image")
    data = _split(tfds, builder, split, folder, image)
    name = f"{builder.info.name}/{builder.info.version}/{split}"
    return TfdsRecords(data, name, image, caption, image_id)


def _split(tfds: Any, builder: Any, split: str, folder: Any, image: str) -> Sequence[Any]:
    try:
        return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise SourceError(
            f"{folder}: was built as {builder.info.file_format.value}, which has no random access; "
            "build it with download_and_prepare(file_format='array_record')"
        ) from error
    except ValueError as error:
        raise SourceError(
            f"{folder}: has no split {split!r}; it has {', '.join(builder.info.splits)} ({error})"
        ) from error


def _has(features: Any, name: str) -> bool:
    try:
        _feature(features, name)
    except KeyError:
        return False
    return True


def _feature(features: Any, name: str) -> Any:
    """The feature of a name, in which "/" may part the name of a group from that of its member.

    TFDS' own names may hold "/", too. Raises KeyError.
    """
    if name in features:
        return features[name]
    group, _, member = name.partition("/")
    return features[group][member]


def _texts(value: Any) -> list[str]:
    """Texts of a text, or of lists of them."""
    if isinstance(value, bytes):
        return [value.decode("utf-8", "replace").strip()]
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, np.ndarray | list | tuple):
        return [text for part in value for text in _texts(part)]
    return []
