"""What is set of Orbax for the whole process: which arrays it cuts, and what it logs."""

from __future__ import annotations

import logging

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

# Where an array lies on several devices, Orbax lets each write its part, and cuts each part by a
# program of its own. For small arrays compiling and starting those takes far longer than the
# writing that they share: of the thousand arrays of a tiny model on eight devices, seconds.
LEAST_PART = 2**20  # bytes
_UNIMPORTANT = ("Metadata file does not exist", "Type handler registry type")


def _relevant(record: logging.LogRecord) -> bool:
    """Drops Orbax's traceback of a failed save, which we tell, and warnings of no consequence."""
    if "/orbax/" in record.pathname:
        record.exc_info = None
    return not any(text in str(record.msg) for text in _UNIMPORTANT)


def set_orbax_up() -> None:
    """Done once, before the first checkpoint."""
    absl_logging.get_absl_logger().addFilter(_relevant)
    ocp.type_handlers.register_type_handler(
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PART),
        override=True,
    )
