"""TFDS data sets built here, in a process that has neither jax nor TensorFlow."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import build_source
from mplug_jax.data.sources.tfds_source import TfdsRecords
from mplug_jax.data.transforms import decode_image

# A builder, `mini`; TFDS encodes arrays with TensorFlow only, so files go in.
BUILDER = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def picture(shade):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(file, "PNG")
    file.seek(0)
    return file

def examples(first, count):
    for k in range(first, first + count):
        texts = (f"first of {k}", "", "last")
        many = [{"text": text, "id": number} for number, text in enumerate(texts)]
        yield k, {"image": picture(k), "caption": f"caption {k}", "captions": many,
                  "list": ["x", f"y {k}"], "image/id": 100 + k, "empty": ""}

class Mini(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="png"), "caption": text, "empty": text,
            "captions": tfds.features.Sequence({"text": text, "id": np.int64}),
            "list": tfds.features.Sequence(text), "image/id": np.int64}))

    def _split_generators(self, downloads):
        return {"train": examples(0, 6), "val": examples(50, 2)}

    def _generate_examples(self):
        raise NotImplementedError
"""
# Builds it in the folder argv[1].
BUILD = f"""{BUILDER}
Mini(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
# Reads it by the name under which its class is registered, and by that of one not built.
READ_BY_NAME = f"""{BUILDER}
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

class Unbuilt(Mini):
    pass

spec = {{"kind": "tfds", "split": "val", "data_dir": "."}}
source = build_source({{**spec, "name": "mini"}}, sys.argv[1])
print(len(source), sorted(r["captions"][0] for r in source), source[0]["id"])
try:
    build_source({{**spec, "name": "unbuilt"}}, sys.argv[1])
except SourceError as error:
    print(error)
"""

# Reads it as a data worker would, and says which modules that took.
READ = """
import sys
from mplug_jax.data.worker import JaxBlocker
sys.meta_path.insert(0, JaxBlocker())
from mplug_jax.data.sources import build_source
source = build_source({"kind": "tfds", "path": sys.argv[1], "split": "val"})
print(len(source), sorted(r["captions"][0] for r in source), type(source[0]["image"]).__name__)
print([name for name in ("jax", "tensorflow") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    run(BUILD, folder)
    return folder


@pytest.fixture(scope="module")
def version(data_dir):
    return data_dir / "mini/1.2.0"


def run(script: str, folder: Path) -> str:
    command = [sys.executable, "-c", script, str(folder)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(version, split="train", **spec):
    return build_source({"kind": "tfds", "path": "1.2.0", "split": split, **spec}, version.parent)


def test_pictures_stay_encoded_and_belong_to_their_captions(version):
    source = records(version)
    assert len(source) == 6
    shades = []
    for index in range(6):
        record = source[index]
        assert isinstance(record["image"], bytes)
        shade = int(decode_image(record["image"])[0, 0, 0])
        assert record["captions"] == [f"caption {shade}"]
        assert (record["id"], record["image_id"]) == (f"mini/1.2.0/train/{index}", index)
        shades.append(shade)
    assert sorted(shades) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        source[6]


def test_parts_of_splits(version):
    whole = [record["captions"] for record in records(version)]
    assert [record["captions"] for record in records(version, "train[2:4]")] == whole[2:4]
    assert len(records(version, "train+val")) == 8


def test_names_of_features(version):
    nested = records(version, "val", caption="captions/text", image_id="image/id")
    for record in nested:
        shade = int(decode_image(record["image"])[0, 0, 0])
        assert record["captions"] == [f"first of {shade}", "last"]
        assert record["image_id"] == 100 + shade
    assert [len(record["captions"]) for record in records(version, "val", caption="list")] == [2, 2]


def test_a_pickled_source_reads_on(version):
    source = records(version)
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3]


def test_neither_tensorflow_nor_jax_is_imported(version):
    counted, modules = run(READ, version).splitlines()[-2:]
    assert counted == "2 ['caption 50', 'caption 51'] bytes"
    assert modules == "[]"


def test_a_registered_name(data_dir, version):
    """A builder's class, where it is there; else its files are enough."""
    by_class, unbuilt = run(READ_BY_NAME, data_dir).splitlines()[-2:]
    assert by_class == "2 ['caption 50', 'caption 51'] mini/1.2.0/val/0"
    assert unbuilt == (
        f"'unbuilt': is not built in {data_dir}/unbuilt/1.2.0; build it with tfds.builder("
        f"'unbuilt', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    )
    for name in ("mini", "mini:1.2.0"):
        spec = {"kind": "tfds", "name": name, "data_dir": str(data_dir), "split": "train"}
        source = build_source(spec)
        assert [r["captions"] for r in source] == [r["captions"] for r in records(version)]


def test_names_that_tfds_cannot_construct_are_one_message(data_dir):
    """`coco_captions` is registered, but its module needs TensorFlow."""
    for name, reason in (
        ("coco_captions", "No module named 'tensorflow'"),
        ("no_such_set", "Dataset no_such_set not found"),
    ):
        spec = {"kind": "tfds", "name": name, "data_dir": str(data_dir), "split": "train"}
        with pytest.raises(SourceError, match=rf"{name}.*{reason}.*as `path`") as raised:
            build_source(spec)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "keys", [{}, {"path": "a", "name": "mini"}, {"path": "a", "data_dir": "b"}]
)
def test_either_a_path_or_a_name(keys):
    with pytest.raises(ValueError, match="either 'path', the folder of one version, or 'name'"):
        build_source({"kind": "tfds", "split": "train", **keys})


def test_errors_name_what_there_is(version, data_dir):
    with pytest.raises(SourceError, match=r"no split 'test'; it has train, val"):
        records(version, "test")
    with pytest.raises(SourceError, match=r"no feature 'text' .*'caption'\); it has .*captions"):
        records(version, caption="text")
    with pytest.raises(SourceError, match=r"no feature 'captions/words'"):
        records(version, caption="captions/words")
    with pytest.raises(SourceError, match=r"'caption' is no Image"):
        records(version, image="caption")
    with pytest.raises(SourceError, match=r"mini: is no data set .*folder of one version"):
        build_source({"kind": "tfds", "path": "mini", "split": "train"}, data_dir)
    with pytest.raises(SourceError, match=r"there is no folder .*config\.data\.root"):
        build_source({"kind": "tfds", "path": "maxi", "split": "train"}, data_dir)
    with pytest.raises(SourceError, match=r"train/0: 'empty' holds no text; choose other features"):
        records(version, caption="empty")
    with pytest.raises(SourceError, match=r"'caption' is b'caption .', no usable image_id"):
        records(version, image_id="caption")


def test_a_format_without_random_access_is_refused(version, tmp_path):
    copy = tmp_path / "1.2.0"
    copy.mkdir()
    for file in ("features.json", "dataset_info.json"):
        text = (version / file).read_text()
        (copy / file).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(SourceError, match=r"built as tfrecord.*file_format='array_record'"):
        build_source({"kind": "tfds", "path": str(copy), "split": "train"})


def test_a_record_that_cannot_be_parsed_is_bad():
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("chunk data hash mismatch")
            return {"image": b"", "caption": np.array([b"one", b" two "], object)}

    source = TfdsRecords(Broken([0, 1]), "mini/train", "image", "caption")
    assert source[0]["captions"] == ["one", "two"]
    with pytest.raises(BadSample, match="mini/train/1: cannot be read: chunk data hash mismatch"):
        source[1]


def test_shards_that_are_missing_show_before_the_run(version, tmp_path):
    for file in ("features.json", "dataset_info.json"):
        (tmp_path / file).write_bytes((version / file).read_bytes())
    assert "train" in tfds.builder_from_directory(str(tmp_path)).info.splits
    with pytest.raises(SourceError, match=r"train/0: cannot be read"):
        build_source({"kind": "tfds", "path": str(tmp_path), "split": "train"})
