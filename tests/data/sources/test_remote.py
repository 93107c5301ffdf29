"""Sources whose files lie at URLs; fsspec's memory:// and file:// stand for gs:// and s3://."""

import json
import os
import uuid

import fsspec
import pytest
from PIL import Image

from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import build_source
from mplug_jax.data.sources.array_records import encode_record
from mplug_jax.data.transforms import decode_image
from tests.data.sources.test_array_records import write_shard
from tests.data.sources.test_tar_files import samples, write_tar


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path, monkeypatch):
    """(URL, local folder): `upload` puts what is in the folder at the URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = tmp_path / "bucket"
    local.mkdir()
    if request.param == "file":
        yield f"file://{local}", local
    else:
        url = f"memory:///{uuid.uuid4().hex}"
        yield url, local
        fsspec.filesystem("memory").rm(url, recursive=True)


def upload(bucket) -> str:
    url, local = bucket
    if url.startswith("memory"):
        for file in local.rglob("*"):
            if file.is_file():
                fsspec.filesystem("memory").pipe(
                    f"{url}/{file.relative_to(local).as_posix()}", file.read_bytes()
                )
    return url


def annotated(local, rows, name="train.json"):
    (local / "images/sub").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), (9, 9, 9)).save(local / "images/sub/a.png")
    (local / name).write_text(json.dumps(rows))


ROWS = [{"image": "sub/a.png", "caption": "a naïve dog"}]


@pytest.mark.parametrize("images", ["images", "whole URL"])
def test_annotations_and_pictures_under_a_remote_root(bucket, images):
    annotated(bucket[1], ROWS)
    url = upload(bucket)
    folder = f"{url}/images/" if images == "whole URL" else images
    [record] = build_source({"kind": "captions", "path": "train.json", "images": folder}, url)
    assert record["image"] == f"{url}/images/sub/a.png"
    assert record["captions"] == ["a naïve dog"]
    assert decode_image(record["image"]).shape == (20, 40, 3)


def test_root_itself_is_the_folder_of_pictures(bucket):
    annotated(bucket[1], [{"image": "images/sub/a.png", "caption": "a dog"}])
    url = upload(bucket)
    for path, root in (("train.json", url), (f"{url}/train.json", None)):
        [record] = build_source({"kind": "captions", "path": path}, root)
        assert decode_image(record["image"]).shape == (20, 40, 3)


def test_local_annotations_with_remote_pictures(bucket, tmp_path):
    annotated(bucket[1], ROWS)
    url = upload(bucket)
    (tmp_path / "here.json").write_text(json.dumps(ROWS))
    spec = {"kind": "captions", "path": "here.json", "images": f"{url}/images"}
    [record] = build_source(spec, tmp_path)
    assert decode_image(record["image"]).shape == (20, 40, 3)


def test_boxes_in_pixels_take_the_size_of_a_remote_picture(bucket):
    annotated(bucket[1], [["sub/a.png", "mask", [10, 5, 20, 10], "the dog", []]])
    spec = {"kind": "grounding", "path": "train.json", "images": "images"}
    [record] = build_source(spec, upload(bucket))
    assert record["phrases"][0]["box"] == [0.25, 0.25, 0.75, 0.75]


def test_errors_of_remote_files(bucket):
    rows = [*ROWS, {"image": "../secret.png", "caption": "x"}, {"image": "no.png", "caption": "y"}]
    annotated(bucket[1], rows)
    annotated(bucket[1], [{"image": "no.png", "caption": "y"}], "none.json")
    url = upload(bucket)
    spec = {"kind": "captions", "path": "train.json", "images": "images"}
    source = build_source({**spec, "max_bad_fraction": 0.5}, url)
    [(where, reason)] = source.bad_records
    assert where == f"{url}/train.json:1" and "lies outside the folder" in reason
    with pytest.raises(BadSample, match=r"images/no\.png: no such file"):
        decode_image(source[1]["image"])
    with pytest.raises(SourceError, match=r"none of the pictures looked for .*images/no\.png"):
        build_source({**spec, "path": "none.json"}, url)
    with pytest.raises(SourceError, match=rf"there is no file {url}/missing\.json"):
        build_source({**spec, "path": "missing.json"}, url)
    with pytest.raises(SourceError, match=r"config\.data\.root is .*no such folder"):
        build_source(spec, f"{url}/nowhere")


def test_tars(bucket, tmp_path):
    write_tar(bucket[1] / "cc3m/00000.tar", samples(0, 2))
    write_tar(bucket[1] / "cc3m/00001.tar", samples(2, 2))
    (bucket[1] / "cc3m/00000_stats.json").write_text("{}")
    url = upload(bucket)
    for path in ("cc3m", "cc3m/*.tar", "cc3m/00000.tar"):
        source = build_source({"kind": "webdataset", "path": path}, url)
        count = 2 if path.endswith("0.tar") else 4
        shades = [int(decode_image(record["image"])[0, 0, 0]) for record in source]
        assert shades == list(range(count))
        assert [record["captions"] for record in source][1] == ["caption 1"]
    assert source[0]["id"] == "00000.tar/000000000"
    # Nothing is written to the store; both indexes are in the cache.
    assert len(os.listdir(tmp_path / "cache/mplug_jax")) == 2
    assert sorted(os.listdir(bucket[1] / "cc3m"))[-1] == "00001.tar"
    with pytest.raises(SourceError, match=r"no match of a pattern with \*, at .*cc12m"):
        build_source({"kind": "webdataset", "path": "cc12m"}, url)


def test_array_records(bucket):
    for number in (0, 1):
        record = {"id": f"r{number}", "image": b"jpeg", "image_id": number, "captions": ["x"]}
        write_shard(bucket[1] / f"vg/{number}.array_record", [encode_record(record)])
    source = build_source({"kind": "arrayrecord", "path": "vg"}, upload(bucket))
    assert sorted(record["id"] for record in source) == ["r0", "r1"]


def test_what_must_be_local(bucket):
    (bucket[1] / "clips").mkdir()
    (bucket[1] / "clips/a.mp4").write_bytes(b"x")
    (bucket[1] / "clips.json").write_text('[{"clip_name": "a", "caption": "x"}]')
    url = upload(bucket)
    with pytest.raises(SourceError, match="local disks only"):
        build_source({"kind": "video", "path": "clips.json", "videos": "clips"}, url)
    with pytest.raises(SourceError, match="local disks only"):
        build_source({"kind": "tfds", "path": "clips", "split": "train"}, url)
