"""Files by path or by URL: gs://, s3:// and whatever else fsspec reads; local ones are pathlib's.

What has "://" in it is a URL. Only then is fsspec imported, which the extra `remote` installs.
"""

import contextlib
import errno
import hashlib
import importlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mplug_jax.data.records import SourceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL, with those of pathlib's methods that the data sources need.

    It is no `os.PathLike`, so that nothing takes it for a local path.

    Every method that looks raises SourceError where fsspec or the package for the URL's kind is
    missing, and OSError (with `strerror`) where the file cannot be read.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | os.PathLike[str]) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{os.fspath(name)}")

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def is_absolute(self) -> bool:
        return True

    def exists(self) -> bool:
        return self._type() is not None

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading in binary, the only mode there is."""
        with _as_os_errors(self.url):
            system, path = _file_system(self.url)
            return system.open(path, mode)

    def read_bytes(self) -> bytes:
        with _as_os_errors(self.url):
            system, path = _file_system(self.url)
            return system.cat_file(path)

    def read_text(self, encoding: str = "utf-8") -> str:
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    def read_range(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on."""
        with _as_os_errors(self.url):
            system, path = _file_system(self.url)
            return system.cat_file(path, start=offset, end=offset + size)

    def version(self) -> str:
        """A text that changes when the file does."""
        with _as_os_errors(self.url):
            system, path = _file_system(self.url)
            return f"{system.size(path)}-{system.ukey(path)}"

    def matches(self, pattern: str = "") -> list["RemotePath"]:
        """The files in this folder, or those that a pattern below it with * and ? matches."""
        with _as_os_errors(self.url):
            system, path = _file_system(self.url)
            found = system.glob(f"{path.rstrip('/')}/{pattern or '*'}")
            return [RemotePath(system.unstrip_protocol(name)) for name in sorted(found)]

    def _type(self) -> str | None:
        try:
            with _as_os_errors(self.url):
                system, path = _file_system(self.url)
                return system.info(path)["type"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(
                f"{self.url}: cannot be reached: {error.strerror}; check the address, the network "
                "and your credentials"
            ) from error


Place = Path | RemotePath


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> Place:
    """The file or folder that a path or a URL names."""
    return RemotePath(os.fspath(path)) if is_remote(path) else Path(path)


def joined(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Place:
    """`path` below `root`, a folder or a URL, unless it is absolute or a URL itself."""
    if not root or is_remote(path) or os.path.isabs(path):
        return place(path)
    return place(root) / path


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file or URL from `offset` on; no handle stays open.

    Raises:
      OSError: it cannot be read, or ends too early.
      SourceError: as `RemotePath`.
    """
    if is_remote(path):
        content = RemotePath(path).read_range(offset, size)
    else:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    if len(content) != size:
        reason = f"ends at byte {offset + len(content)}, not {offset + size}: was it changed?"
        raise OSError(errno.EIO, reason, path)
    return content


def version_of(file: Place) -> str:
    """A text that changes when the file does: of local ones size and time of the last change."""
    if isinstance(file, RemotePath):
        return file.version()
    status = file.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def cache_folder() -> Path:
    """Where files of our own go that have no better place: `mplug_jax` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mplug_jax"


def cached_name(file: Place, suffix: str = "") -> Path:
    """Place in `cache_folder` of what belongs to a file; others of its name have another one."""
    whole = str(file if isinstance(file, RemotePath) else file.absolute())
    digest = hashlib.sha256(f"{whole}\n{suffix}".encode()).hexdigest()[:16]
    return cache_folder() / f"{digest}-{whole.rpartition('/')[2]}"


def local_copy(file: RemotePath) -> Path:
    """A copy of a remote file in `cache_folder`, made unless this version of it is there.

    Raises:
      SourceError: the file cannot be read, or the copy cannot be written.
    """
    try:
        copy = cached_name(file, file.version())
        if not copy.exists():
            logger.info("copying %s to %s", file, copy)
            system, path = _file_system(file.url)
            with _as_os_errors(file.url):
                write_whole(copy, lambda unfinished: system.get_file(path, unfinished))
        return copy
    except OSError as error:
        raise SourceError(
            f"{file}: cannot be copied to {cache_folder()}: {error.strerror}; XDG_CACHE_HOME names "
            "the folder that copies go to"
        ) from error


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Lets `write` fill a file, which appears as `path` only once it is complete.

    Raises:
      OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(unfinished)
        # mkstemp's files are the owner's alone; an index serves all who read the data.
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    try:
        return importlib.import_module("fsspec").url_to_fs(url)
    except ImportError as error:
        raise SourceError(
            f"{url}: reading it needs a package that is not installed ({error}); "
            "pip install 'mplug_jax[remote]' has those for gs:// and s3://"
        ) from error
    except ValueError as error:
        raise SourceError(f"{url}: fsspec cannot read such a URL: {error}") from error


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    """Errors of a file system as OSErrors with a reason: each raises those of its own library."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", url) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", url) from error
