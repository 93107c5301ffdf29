"""What a data worker process runs before anything else: it closes the door to jax, and ends with
the training process alone.

Grain imports jax wherever it is installed and does without it otherwise. In a worker jax would
only cost memory and start-up time, and code that computed with it would seize the accelerator the
training process owns. `mplug_jax.data.pipeline.keep_workers_light` makes spawned processes run
this module in place of the parent's main script.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from absl import logging as absl_logging


class JaxBlocker:
    """Import hook that makes `import jax` fail as if jax were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuses jax and jaxlib, and leaves every other module to the hooks after it."""
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(
                f"{name} is not available in data workers: sources, transforms and tokenizers "
                "must work with numpy alone",
                name=name,
            )
        return None


def wanted(record: logging.LogRecord) -> bool:
    """Drops the line in which Grain says, in every worker, that it does without jax."""
    return not str(record.msg).startswith("Failed to load jax profiler")


def end_with_parent() -> None:
    """Lets this process outlive no training process, and nothing but that end it.

    The terminal's Ctrl-C and a scheduler's SIGTERM go to the whole group, while the training
    process may still ask for batches. It ends its workers itself, by a flag or by SIGKILL.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    thread = threading.Thread(target=_follow, args=(os.getppid(),), name="parent", daemon=True)
    thread.start()


def _follow(parent: int) -> None:
    # A process whose parent has died gets another one.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# `__mp_main__` is what multiprocessing calls a main module in a spawned process; processes that
# others spawn are left alone.
if __name__ == "__mp_main__" and multiprocessing.current_process().name.startswith("grain-"):
    end_with_parent()
    sys.meta_path.insert(0, JaxBlocker())
    absl_logging.get_absl_logger().addFilter(wanted)
