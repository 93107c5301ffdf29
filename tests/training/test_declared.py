"""Checkpoints whose arrays are larger than their files."""

import json

import jax
import numpy as np
import pytest
import tensorstore

from mplug_jax.training.checkpoint import load_params, read_params, save_params
from mplug_jax.training.declared import implausible
from mplug_jax.training.integrity import CHECKSUMS_FILE, CheckpointError

ROWS, COLUMNS = 2_500_000, 1_000_000  # 10 TB of float32


def test_an_array_of_ten_terabytes_is_told_before_memory_is_taken(tmp_path):
    """The position embeddings may have any number of rows, so that no other check sees it."""
    name = "visual_encoder/position_embedding"
    folder = save_params(tmp_path, {"visual_encoder": {"position_embedding": np.ones((4, 3))}})
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/state/"})
    store, key = store.result(), f"params.{name.replace('/', '.')}/.zarray"
    described = json.loads(store.read(key).result().value)
    store.write(key, json.dumps({**described, "shape": [ROWS, COLUMNS]}).encode()).result()
    (folder / CHECKSUMS_FILE).unlink()  # whoever forges the one can write the other
    wanted = {"position_embedding": jax.ShapeDtypeStruct((5, COLUMNS), np.float32)}
    for load in (
        lambda: read_params(tmp_path),
        lambda: load_params(tmp_path, {"visual_encoder": wanted}, (2, 2)),
    ):
        with pytest.raises(CheckpointError, match="declares 10,000,000,000,000 bytes") as raised:
            load()
        assert f"The largest is {name}, ({ROWS}, {COLUMNS})" in str(raised.value)


def test_what_files_can_hold():
    """Small ones are never refused; large ones may be packed, but not to nearly nothing."""
    assert not implausible(2**30, 100)
    assert not implausible(2**31, 2**31) and not implausible(2**31, 2**28)
    assert implausible(2**31, 2**20) and implausible(10**13, 2**30)
