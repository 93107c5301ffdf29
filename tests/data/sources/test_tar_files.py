"""WebDataset tars made here, as img2dataset would write them."""

import io
import json
import logging
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.pipeline import train_iterator
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.sources import build_source, tar_index
from mplug_jax.data.transforms import decode_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mplug_jax"


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(first: int, count: int):
    """Files of samples number `first` and on: the picture's shade is the sample's number."""
    for number in range(first, first + count):
        yield f"{number:09d}.png", picture(number)
        yield f"{number:09d}.txt", f"caption {number}"
        yield f"{number:09d}.json", json.dumps({"caption": f"json {number}", "status": "success"})


def shade_of(record) -> int:
    return int(decode_image(record["image"])[0, 0, 0])


def webdataset(root, path="cc3m", **spec):
    return build_source({"kind": "webdataset", "path": path, **spec}, root)


def make_example(record, rng):
    return {"shade": np.int32(shade_of(record)), "image_id": np.int32(record["image_id"])}


def test_every_sample_of_every_tar_by_its_place(tmp_path):
    write_tar(tmp_path / "cc3m/00000.tar", samples(0, 3))
    write_tar(tmp_path / "cc3m/00001.tar", [])
    write_tar(tmp_path / "cc3m/00002.tar", samples(10, 2))
    (tmp_path / "cc3m/00000.parquet").write_bytes(b"of no use")
    source = webdataset(tmp_path)
    expected = [0, 1, 2, 10, 11]
    assert len(source) == 5
    for index in (4, 0, 3, 2, 1):
        record = source[index]
        assert shade_of(record) == expected[index]
        assert record["captions"] == [f"caption {expected[index]}"]
        assert record["image_id"] == index
    assert [source[i]["id"] for i in (0, 4)] == ["00000.tar/000000000", "00002.tar/000000011"]
    with pytest.raises(IndexError):
        source[5]
    assert source.cut == [] and source.bad_records == []


def test_pattern_and_single_file(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_tar(tmp_path / name, samples(1, 1))
    assert len(webdataset(tmp_path, "a/1.tar")) == 1
    both = webdataset(tmp_path, "*/0.tar")
    assert [record["id"] for record in both] == ["a/0.tar/000000001", "b/0.tar/000000001"]


def test_caption_of_json_where_there_is_no_text(tmp_path):
    files = [
        ("k/1.JPG", picture(1)),
        ("k/1.json", '{"caption": " from json "}'),
        ("k/2.webp", picture(2)),
        ("k/2.txt", "  "),
        ("k/2.json", '{"caption": "second choice"}'),
        ("k/3.seg.png", picture(9)),  # key k/3, but no kind of picture that is known
        ("k/3.png", picture(3)),
        ("k/3.txt", "a naïve – caption\n"),
        ("k/._3.png", b"left by a Mac"),
    ]
    write_tar(tmp_path / "x.tar", files)
    records = list(webdataset(tmp_path, "x.tar"))
    assert [(shade_of(record), *record["captions"]) for record in records] == [
        (1, "from json"),
        (2, "second choice"),
        (3, "a naïve – caption"),
    ]
    assert records[0]["id"] == "x.tar/k/1"


def test_long_names_and_files_of_a_sample_that_lie_apart(tmp_path):
    name = "folder/" + "n" * 150
    files = [(f"{name}.png", picture(5)), *((f"{i}.mp3", bytes(9000)) for i in range(9))]
    write_tar(tmp_path / "x.tar", [*files, (f"{name}.txt", "far away")])
    [record] = webdataset(tmp_path, "x.tar", max_bad_fraction=0.95)
    assert (shade_of(record), record["captions"]) == (5, ["far away"])
    assert record["id"] == f"x.tar/{name}"


def test_samples_without_picture_or_caption_are_bad(tmp_path):
    bad = [("a.txt", "no picture"), ("b.png", picture(0)), ("c.png", b""), ("c.txt", "empty")]
    broken = [("d.png", picture(0)), ("d.json", "{"), ("e.png", picture(0)), ("e.json", "[1]")]
    write_tar(tmp_path / "x.tar", [*samples(0, 5), *bad, *broken])
    source = webdataset(tmp_path, "x.tar", max_bad_fraction=0.5)
    assert len(source) == 5
    reasons = {where.rpartition("/")[2]: why for where, why in source.bad_records}
    assert reasons["a"].startswith("has no picture")
    assert reasons["b"].startswith("has no caption")
    assert reasons["c"] == "the picture is empty"
    assert "damaged" in reasons["d"] and "not an object" in reasons["e"]
    with pytest.raises(SourceError, match=r"x\.tar: 5 of 10 records are bad.*x\.tar/a: has no"):
        webdataset(tmp_path, "x.tar", max_bad_fraction=0.4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (r'{"caption": "\ud83d"}', "damaged: .*surrogates"),
        ("[" * 100_000, "damaged: .*recursion"),
        ('{"caption": 3}', r"caption \(\.json\) is 3, not a text"),
        (b'{"caption": "\xff"}', "damaged"),
    ],
)
def test_json_that_holds_no_usable_caption(tmp_path, content, reason):
    write_tar(tmp_path / "x.tar", [*samples(0, 1), ("a.png", picture(1)), ("a.json", content)])
    [(where, why)] = webdataset(tmp_path, "x.tar", max_bad_fraction=0.5).bad_records
    assert where.endswith("x.tar/a") and re.search(reason, why)


def test_headers_are_read_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", samples(0, 4))
    first = webdataset(tmp_path, "x.tar")
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.index"]
    monkeypatch.setattr(tar_index.tarfile, "open", None)
    assert [r["captions"] for r in webdataset(tmp_path, "x.tar")] == [r["captions"] for r in first]


@pytest.mark.parametrize("damage", ["newer", "cut", "garbage"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path, damage):
    shard, index = tmp_path / "x.tar", tmp_path / "x.tar.index"
    write_tar(shard, samples(0, 4))
    webdataset(tmp_path, "x.tar")
    if damage == "newer":
        write_tar(shard, samples(20, 4))  # of the same size
        os.utime(shard, ns=(1, 1))
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:-1])
    else:
        index.write_bytes(b"\x00{}\n")
    first = 20 if damage == "newer" else 0
    assert [shade_of(r) for r in webdataset(tmp_path, "x.tar")] == list(range(first, first + 4))


def test_index_goes_to_the_cache_where_the_folder_takes_none(tmp_path, cache, monkeypatch):
    write_tar(tmp_path / "x.tar", samples(0, 2))
    (tmp_path / "x.tar.index").mkdir()  # nothing can be renamed to this
    assert len(webdataset(tmp_path, "x.tar")) == 2
    assert [name.rpartition("-")[2] for name in os.listdir(cache)] == ["x.tar"]
    monkeypatch.setattr(tar_index.tarfile, "open", None)
    assert shade_of(webdataset(tmp_path, "x.tar")[1]) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x.tar"))  # no folder
    with pytest.raises(SourceError, match=r"index cannot be kept.*XDG_CACHE_HOME"):
        webdataset(tmp_path, "x.tar")
    assert sorted(os.listdir(tmp_path)) == ["cache", "x.tar", "x.tar.index"]


# Three samples of two files each, and of each file a header and its content: twelve blocks.
@pytest.mark.parametrize(
    ("size", "usable"),
    [
        (8 * 512, 2),  # between two samples: only the missing end mark tells
        (8 * 512 + 3, 2),  # in the header of the third picture
        (9 * 512 + 30, 2),  # in the third picture
        (10 * 512, 2),  # after it, before its caption
        (11 * 512 + 20, 3),  # the caption is whole, what pads it is not
        (12 * 512, 3),  # only the end mark is missing
    ],
)
def test_a_tar_that_was_cut_off_is_used_as_far_as_it_goes(tmp_path, caplog, size, usable):
    whole = tmp_path / "a/0.tar"
    write_tar(whole, [file for file in samples(0, 3) if not file[0].endswith("json")])
    write_tar(tmp_path / "a/1.tar", samples(3, 1))
    whole.write_bytes(whole.read_bytes()[:size])
    with caplog.at_level(logging.WARNING):
        source = webdataset(tmp_path, "a", max_bad_fraction=0.5)
    shades = [shade_of(record) for record in source]
    assert shades == [*range(usable), 3]
    assert len(source.cut) == 1 and "0.tar" in source.cut[0]
    assert "cut off" in caplog.text and "1.tar" not in caplog.text


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(SourceError, match=r"a\.tar: is no tar file"):
        webdataset(tmp_path, "a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"b\.tar: no usable records"):
        webdataset(tmp_path, "b.tar")
    with pytest.raises(SourceError, match=r"folder .* holds no file called \*\.tar"):
        (tmp_path / "none").mkdir()
        webdataset(tmp_path, "none")
    with pytest.raises(SourceError, match=r"no match.*config names 'c\*\.tar'; config\.data\.root"):
        webdataset(tmp_path, "c*.tar")
    with pytest.raises(SourceError, match=r"config\.data\.root is .*no such folder"):
        webdataset(tmp_path / "missing")


def test_a_tar_that_changes_under_a_run_gives_bad_samples(tmp_path):
    write_tar(tmp_path / "x.tar", samples(0, 2))
    source = webdataset(tmp_path, "x.tar")
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    with pytest.raises(BadSample, match=r"x\.tar/000000001: cannot be read: ends at byte"):
        source[1]
    (tmp_path / "x.tar").write_bytes(b" " * 20000)
    with pytest.raises(BadSample, match=r"x\.tar/000000001: .*did the file change"):
        source[1]
    (tmp_path / "x.tar").unlink()
    with pytest.raises(BadSample, match=r"x\.tar/000000001: cannot be read: No such file"):
        source[1]


def test_a_pickled_source_is_small_and_reads_on(tmp_path):
    write_tar(tmp_path / "x.tar", samples(0, 50))
    source = webdataset(tmp_path, "x.tar")
    shade_of(source[0])
    packed = pickle.dumps(source)
    assert len(packed) < 1500
    assert shade_of(pickle.loads(packed)[49]) == 49


def test_no_files_stay_open(tmp_path):
    for number in range(8):
        write_tar(tmp_path / f"a/{number}.tar", samples(number, 1))
    source = webdataset(tmp_path, "a")
    before = len(os.listdir("/proc/self/fd"))
    tar_index._rows.cache_clear()
    assert [shade_of(source[i]) for i in range(8)] == list(range(8))
    tar_index._rows.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_worker_processes_read_the_same(tmp_path):
    write_tar(tmp_path / "a/0.tar", samples(0, 5))
    write_tar(tmp_path / "a/1.tar", samples(5, 5))
    batches = {}
    for workers in (0, 2):
        iterator = train_iterator(
            [(webdataset(tmp_path, "a"), 1.0)], make_example, seed=3, batch_size=5, workers=workers
        )
        batches[workers] = [next(iterator) for _ in range(2)]
        iterator.close()
    for ours, theirs in zip(batches[0], batches[2], strict=True):
        np.testing.assert_array_equal(ours["shade"], theirs["shade"])
        np.testing.assert_array_equal(ours["shade"], ours["image_id"])
    assert sorted(np.concatenate([b["shade"] for b in batches[0]])) == list(range(10))


def test_a_tar_writes_nothing_outside_its_folder(tmp_path, cache):
    """Nothing is unpacked: a member's name is a name only, and links are passed over."""
    files = [("../../evil.png", picture(1)), ("../../evil.txt", "a"), ("/evil.png", picture(2))]
    write_tar(tmp_path / "a/b/0.tar", [*files, ("/evil.txt", "b")])
    with tarfile.open(tmp_path / "a/b/0.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    source = webdataset(tmp_path, "a/b")
    assert [(record["captions"], shade_of(record)) for record in source] == [(["a"], 1), (["b"], 2)]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a", "a/b", "a/b/0.tar", "a/b/0.tar.index"]
    assert not os.path.exists("/evil.png")


def test_captions_that_are_not_utf_8_are_skipped(tmp_path):
    bad = [("b.png", picture(2)), ("b.txt", b"\xe9t\xe9"), ("c.png", picture(3))]
    write_tar(tmp_path / "cc3m/0.tar", [*samples(0, 1), *bad, ("c.json", b'{"caption": "\xff"}')])
    source = webdataset(tmp_path, max_bad_fraction=0.7)
    assert [record["captions"] for record in source] == [["caption 0"]]
    assert [reason[:26] for _, reason in source.bad_records] == [
        "the .txt file is damaged: ",
        "the .json file is damaged:",
    ]
