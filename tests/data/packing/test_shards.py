"""Packing without Beam: what is in the shards, what is left out, and starting again."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mplug_jax.data.decoding import decode_image
from mplug_jax.data.packing import shards
from mplug_jax.data.packing.manifest import begin
from mplug_jax.data.packing.shards import Exclusion, pack_shard, plain_id, shard_of
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_source

_spec = importlib.util.spec_from_file_location("packed", Path(__file__).with_name("packed.py"))
packed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packed)


@pytest.fixture
def root(tmp_path):
    packed.write_pictures(tmp_path)
    return tmp_path


def digests(out):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in out.glob("data.array_record*")
    }


def test_the_folder_is_a_source_of_the_same_records(root):
    job, out = packed.job_of(root), root / "out"
    assert packed.pack_here(job, out, 4) == [0, 1, 2, 3]
    manifest = packed.finished(job, out)
    assert manifest["counts"] == {"packed": 8, "bad": 1, "excluded": 1, "unusable rows": 0}
    dropped = {row["id"]: row for row in map(json.loads, (out / "report.jsonl").open())}
    assert dropped.keys() == {"5.jpg", "3.jpg"}
    assert dropped["5.jpg"]["path"] == str(root / "images" / "5.jpg")
    assert "5.jpg: cannot be decoded" in dropped["5.jpg"]["reason"]
    assert dropped["3.jpg"]["reason"] == "excluded: looks like an excluded picture"

    source = build_source({"kind": "arrayrecord", "path": "out"}, root)
    original = build_source(json.loads(packed.spec("rows")), root)
    expected = {record["id"]: record for record in (original[i] for i in range(10))}
    records = [source[i] for i in range(len(source))]
    assert {r["id"] for r in records} == expected.keys() - dropped.keys()
    for record in records:
        before = expected[record["id"]]
        assert record["captions"] == before["captions"]
        assert record["image_id"] == before["image_id"]
        pixels, whole = decode_image(record["image"]), decode_image(before["image"])
        if int(record["id"][0]) % 3:
            np.testing.assert_array_equal(pixels, whole)
        else:
            assert pixels.shape == (48, 64, 3)
            means = [each.mean((0, 1)) for each in (pixels, whole)]
            np.testing.assert_allclose(*means, atol=2)


def test_manifest_names_files_counts_and_checksums(root):
    job, out = packed.job_of(root, exclude=()), root / "out"
    packed.pack_here(job, out, 4)
    manifest = packed.finished(job, out)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert {n: s["sha256"] for n, s in manifest["shards"].items()} == digests(out)
    assert sum(shard["records"] for shard in manifest["shards"].values()) == 9
    assert sorted(f.name for f in out.iterdir()) == sorted(
        [*manifest["shards"], "manifest.json", "report.jsonl"]
    )


def test_goes_on_where_it_was_cut_and_then_has_nothing_to_do(root, monkeypatch):
    job, whole, cut = packed.job_of(root), root / "whole", root / "cut"
    packed.pack_here(job, whole, 4)
    packed.finished(job, whole)
    packed.pack_here(job, cut, 2)
    before = {path: path.stat().st_mtime_ns for path in cut.glob("data*")}
    assert packed.pack_here(job, cut, 4) == [2, 3]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    packed.finished(job, cut)
    assert digests(cut) == digests(whole)
    assert begin(job, str(cut)) == []
    assert packed.finished(job, cut)["finished"]


def test_a_killed_writer_leaves_no_shard(root, monkeypatch):
    job, out = packed.job_of(root, shards=1), root / "out"
    todo = begin(job, str(out))
    encode, calls = shards.encode_record, []

    def dies(record):
        calls.append(record)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(record)

    monkeypatch.setattr(shards, "encode_record", dies)
    found = [place for _, place in shards.places(job, 0, 0, 10)]
    with pytest.raises(KeyboardInterrupt):
        pack_shard(job, str(out), 0, found, Exclusion.of([], 3))
    assert [file.name for file in out.iterdir()] == ["manifest.json"]
    assert begin(job, str(out)) == todo == [0]


def test_other_settings_and_lost_shards_are_refused(root):
    job, out = packed.job_of(root), root / "out"
    packed.pack_here(job, out, 1)
    with pytest.raises(SourceError, match="other settings: quality was 90, now 80"):
        begin(packed.job_of(root, quality=80), str(out))
    packed.pack_here(job, out, 4)
    manifest = packed.finished(job, out)
    lost = next(iter(manifest["shards"]))
    (out / lost).unlink()
    with pytest.raises(SourceError, match=f"{lost} is gone: delete manifest.json"):
        begin(job, str(out))
    (out / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="is damaged"):
        begin(job, str(out))


def test_equal_ids_are_packed_once_and_pictures_of_two_sources_stay_apart(root):
    job = packed.job_of(root, sources=(packed.spec("rows"), packed.spec("rows")), exclude=())
    out = root / "out"
    packed.pack_here(job, out, 4)
    counts = packed.finished(job, out)["counts"]
    assert (counts["packed"], counts["duplicate"], counts["bad"]) == (9, 9, 2)
    other = packed.job_of(root, sources=(packed.spec("test"), packed.spec("rows")), exclude=())
    packed.pack_here(other, root / "other", 4)
    packed.finished(other, root / "other")
    source = build_source({"kind": "arrayrecord", "path": "other"}, root)
    ids = {source[i]["id"]: source[i]["image_id"] for i in range(len(source))}
    assert ids["copy.png"] < 2**30 <= min(v for k, v in ids.items() if k != "copy.png")


def test_excluded_ids_count_for_every_record_of_the_picture(root):
    exclusion = Exclusion.of([("a.jpg", None)], 3)
    assert "its id" in exclusion.reason("a.jpg", None)
    assert "its id" in exclusion.reason("a.jpg#2", 5)
    assert exclusion.reason("b.jpg", 5) is None
    assert plain_id("a#b.jpg") == "a#b.jpg"


def test_shards_depend_on_the_id_alone_and_are_even():
    names = [f"{i}.jpg" for i in range(4000)]
    counts = np.bincount([shard_of(name, 8) for name in names])
    assert len(counts) == 8 and (abs(counts - 500) < 100).all()
    # The first eight bytes of the digest, which must never change: packed folders depend on it.
    digest = hashlib.sha256(b"1.jpg").hexdigest()
    assert shard_of("1.jpg", 8) == int(digest[:16], 16) % 8


def test_nothing_to_pack_is_an_error(root):
    job = packed.job_of(root, sources=(packed.spec("test"),))
    packed.pack_here(job, root / "out", 4)
    with pytest.raises(SourceError, match=r"nothing could be packed\. The first reason: excluded"):
        packed.finished(job, root / "out")
