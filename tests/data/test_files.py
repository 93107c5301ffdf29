"""Files by path and by URL; fsspec's memory:// stands for gs:// and s3://."""

import errno
import os
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mplug_jax.data import files
from mplug_jax.data.files import (
    RemotePath,
    is_remote,
    local_copy,
    place,
    read_range,
    version_of,
    write_whole,
)
from mplug_jax.data.records import SourceError


@pytest.fixture
def bucket():
    """A URL of a folder of its own, with two files in it."""
    url = f"memory:///{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(
        {f"{url}/a.txt": "naïve\r\nb".encode(), f"{url}/sub/b.bin": bytes(range(100))}
    )
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_paths_and_urls():
    assert is_remote("gs://bucket/a") and is_remote("file:///a")
    assert not is_remote("a/b") and not is_remote(Path("c:/d"))
    assert place("a/b") == Path("a/b")
    assert place("s3://b/c") == RemotePath("s3://b/c")
    assert str(RemotePath("s3://b/c/") / "d/e.jpg") == "s3://b/c/d/e.jpg"
    assert RemotePath("s3://b/c/d").parent == RemotePath("s3://b/c")
    with pytest.raises(TypeError):  # never taken for a local path
        os.fspath(RemotePath("s3://b/c"))


def test_what_is_there(bucket):
    folder = RemotePath(bucket)
    assert folder.is_dir() and folder.exists() and not folder.is_file()
    assert (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir()
    assert not (folder / "c").exists() and not (folder / "c").is_dir()


def test_contents(bucket):
    folder = RemotePath(bucket)
    assert (folder / "a.txt").read_text("utf-8") == "naïve\nb"  # as pathlib's read_text
    assert (folder / "sub/b.bin").read_bytes() == bytes(range(100))
    with (folder / "sub/b.bin").open("rb") as file:
        file.seek(7)
        assert file.read(2) == bytes([7, 8])
    with pytest.raises(FileNotFoundError) as raised:
        (folder / "c").read_bytes()
    assert raised.value.strerror == "no such file"


def test_matches(bucket):
    names = [str(file).rpartition("/")[2] for file in RemotePath(bucket).matches("*.txt")]
    assert names == ["a.txt"]
    [found] = (RemotePath(bucket) / "sub").matches()
    assert found.read_bytes() == bytes(range(100))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_ranges(where, bucket, tmp_path):
    (tmp_path / "b.bin").write_bytes(bytes(range(100)))
    path = str(tmp_path / "b.bin") if where == "local" else f"{bucket}/sub/b.bin"
    assert read_range(path, 10, 5) == bytes(range(10, 15))
    with pytest.raises(OSError, match="ends at byte 100, not 105"):
        read_range(path, 95, 10)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_versions(where, bucket, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    file = place(tmp_path if where == "local" else bucket) / "a.txt"
    before = version_of(file)
    assert version_of(file) == before
    if where == "local":
        file.write_bytes(b"two")
        os.utime(file, ns=(1, 1))
    else:
        fsspec.filesystem("memory").pipe(str(file), b"two")
    assert version_of(file) != before


def test_local_copies(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = RemotePath(bucket) / "a.txt"
    copy = local_copy(file)
    assert copy.parent == tmp_path / "mplug_jax" and copy.name.endswith("-a.txt")
    assert copy.read_bytes() == "naïve\r\nb".encode()
    with monkeypatch.context() as once:
        once.setattr(MemoryFileSystem, "get_file", None)
        assert local_copy(file) == copy
    fsspec.filesystem("memory").pipe(str(file), b"changed")
    assert local_copy(file).read_bytes() == b"changed"
    with pytest.raises(SourceError, match=r"c: cannot be copied .*no such file"):
        local_copy(RemotePath(bucket) / "c")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def fails(path):
        Path(path).write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "new/a", fails)
    assert os.listdir(tmp_path / "new") == []
    write_whole(tmp_path / "new/a", lambda path: Path(path).write_bytes(b"all"))
    assert os.listdir(tmp_path / "new") == ["a"]
    assert (tmp_path / "new/a").read_bytes() == b"all"


def test_missing_packages_and_unknown_urls(monkeypatch):
    with pytest.raises(SourceError, match=r"nosuch://a: fsspec cannot read such a URL"):
        RemotePath("nosuch://a").exists()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SourceError, match=r"gs://b/a: .*pip install 'mplug_jax\[remote\]'"):
        RemotePath("gs://b/a").read_bytes()


def test_an_unreachable_store_is_not_an_absent_file(monkeypatch):
    class Refused(Exception):
        pass

    class System:
        def info(self, path):
            raise Refused("no credentials")

        cat_file = info

    monkeypatch.setattr(files, "_file_system", lambda url: (System(), "a"))
    with pytest.raises(SourceError, match=r"gs://b/a: cannot be reached: Refused: no credentials"):
        RemotePath("gs://b/a").exists()
    with pytest.raises(OSError) as raised:
        RemotePath("gs://b/a").read_bytes()
    assert raised.value.strerror == "Refused: no credentials"
