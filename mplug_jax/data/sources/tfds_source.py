"""Data sets that TensorFlow Datasets has built, read without TensorFlow."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mplug_jax.data.files import Place, RemotePath
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
    split: str,
    path: str | os.PathLike[str] | None = None,
    name: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    image: str = "image",
    caption: str = "caption",
    image_id: str | None = None,
) -> TfdsRecords:
    """The records of a data set that TFDS has built in a format of random access.

    Args:
      split: a split or a part of one: "train", "train[:90%]".
      path: folder of one version, such as `tensorflow_datasets/coco_captions/2014/1.1.0`; joined
        with `root` where relative.
      name: in place of `path`, what `tfds.data_source` takes: "mnist", "coco_captions/2014:1.1.0".
      data_dir: with `name`, the folder of all data sets, joined with `root` where relative; without
        it TFDS' own, `~/tensorflow_datasets`.
      root: config.data.root.
      image: name of the feature that holds the picture.
      caption: that of the caption or captions; "captions/text" is `text` of each of `captions`.
      image_id: that of a whole number, equal for records of the same picture; without it every
        record counts as another picture.

    Raises:
      ValueError: both or none of `path` and `name`, or `data_dir` without `name`.
      SourceError: the folder is none of TFDS', or the name none that TFDS can construct; nothing is
        built there, it has no such split or feature, was built in a format without random access,
        or as `TfdsRecords`.
    """
    if (path is None) == (name is None) or (data_dir is not None and name is None):
        raise ValueError(
            "a 'tfds' source needs either 'path', the folder of one version, or 'name', which "
            "'data_dir' may be given with"
        )
    # Half a second and some memory in every worker, which only those pay who use it.
    tfds = importlib.import_module("tensorflow_datasets")
    if name is None:
        builder, where = _from_folder(tfds, under_root(path, root, "folder"))
    else:
        folder = None if data_dir is None else under_root(data_dir, root, "folder")
        builder, where = _by_name(tfds, name, folder)
    features = builder.info.features
    for key, feature in (("image", image), ("caption", caption), ("image_id", image_id)):
        if feature is not None and not _has(features, feature):
            raise SourceError(
                f"{where}: has no feature {feature!r} (the source's {key!r}); it has "
                f"{', '.join(features)}"
            )
    if not isinstance(_feature(features, image), tfds.features.Image):
        raise SourceError(f"{where}: the feature {image!r} is no Image")
    data = _split(tfds, builder, split, where, image)
    return TfdsRecords(
        data, f"{builder.info.name}/{builder.info.version}/{split}", image, caption, image_id
    )


def _local(folder: Place) -> Path:
    if isinstance(folder, RemotePath):
        raise SourceError(f"{folder}: TFDS folders are read from local disks only; copy it to one")
    return folder


def _from_folder(tfds: Any, folder: Place) -> tuple[Any, str]:
    """The builder of a version's folder, and what messages call it."""
    try:
        return tfds.builder_from_directory(str(_local(folder))), str(folder)
    except SourceError:
        raise
    except Exception as error:  # of TFDS: missing, damaged or foreign files
        raise SourceError(
            f"{folder}: is no data set that TFDS has built: {error}; `path` is the folder of one "
            "version, which holds dataset_info.json and features.json"
        ) from error


def _by_name(tfds: Any, name: str, data_dir: Place | None) -> tuple[Any, str]:
    """The builder that is registered or has been built under a name, and what messages call it."""
    where = {} if data_dir is None else {"data_dir": str(_local(data_dir))}
    try:
        # Without a folder TFDS' own function assumes this format, too.
        builder = tfds.builder(name, **(where or {"file_format": "array_record"}))
    except Exception as error:  # of TFDS and of the data sets' own modules
        reason = str(error).strip().splitlines() or [repr(error)]
        raise SourceError(
            f"TFDS has no data set {name!r} that it can construct here ({reason[0]}); if it was "
            "built elsewhere, give the folder of its version as `path`, which needs none of its "
            "code"
        ) from error
    if not builder.is_prepared():
        given = "".join(f", {key}={value!r}" for key, value in where.items())
        raise SourceError(
            f"{name!r}: is not built in {builder.data_path}; build it with tfds.builder({name!r}"
            f"{given}, file_format='array_record').download_and_prepare()"
        )
    return builder, str(builder.data_path)


def _split(tfds: Any, builder: Any, split: str, where: str, image: str) -> Sequence[Any]:
    try:
        return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise SourceError(
            f"{where}: was built as {builder.info.file_format.value}, which has no random access; "
            "build it with download_and_prepare(file_format='array_record')"
        ) from error
    except ValueError as error:
        raise SourceError(
            f"{where}: has no split {split!r}; it has {', '.join(builder.info.splits)} ({error})"
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
