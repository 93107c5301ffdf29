"""Set JAX up before any test imports it: CPU, eight fake devices, compiled programs kept."""

import getpass
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# A second run of the suite skips most of its compilation. The folder is the user's own, since
# another user's files in a shared temporary folder could neither be written nor trusted. Set in
# the environment, these reach the processes that tests start, too.
_CACHE = Path(tempfile.gettempdir()) / f"mplug_jax_tests_{getpass.getuser()}" / "compiled"
_CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Programs here compile for longer than they run, so LLVM spends less on them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402 (it reads the environment when imported)

# Eight devices on one CPU let sharding be tested anywhere; they share one pool of threads, as
# many as there are cores, so a test on one device still computes on all of them. Not in the
# environment: a training process that a test starts sees one device, as its user would.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--goldens", help="folder of official cases for tests/parity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many slow tests first, so that at the end no worker waits for another's."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
