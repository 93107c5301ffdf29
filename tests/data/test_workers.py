"""Worker processes: the same batches as without, and no jax in them."""

import itertools
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from mplug_jax.data.examples import PretrainExamples
from mplug_jax.data.pipeline import train_iterator
from mplug_jax.data.sources import build_source
from mplug_jax.data.tokenizers import SentencePieceTokenizer, source_texts, train_sentencepiece
from mplug_jax.data.transforms import ImageTransform

LIGHT = ("records", "tokenizers", "transforms", "randaugment", "examples", "sources", "worker")


@pytest.fixture
def main_spec():
    """Gives the test runner its own main module back."""
    main = sys.modules["__main__"]
    spec = main.__spec__
    yield
    main.__spec__ = spec


@pytest.fixture(scope="module")
def iterator(tmp_path_factory):
    """Makes iterators over scenes, with every random step switched on."""
    source = build_source({"kind": "scenes", "level": "easy", "split": "train", "size": 50})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(source_texts(source), path, 300)
    make_example = PretrainExamples(
        SentencePieceTokenizer(path), ImageTransform((24, 24), train=True), 16, 16, 0.3
    )

    def make(workers):
        return train_iterator([(source, 1.0)], make_example, seed=1, batch_size=8, workers=workers)

    return make


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert type(b[key]) is np.ndarray
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_workers_change_nothing_and_states_move_between_worker_counts(iterator, main_spec):
    plain = iterator(0)
    reference = list(itertools.islice(plain, 12))
    two = iterator(2)
    assert_same(reference[:5], list(itertools.islice(two, 5)))
    state = two.get_state()
    assert_same(reference[5:8], list(itertools.islice(two, 3)))
    two.set_state(state)
    assert_same(reference[5:9], list(itertools.islice(two, 4)))
    two.close()
    plain.set_state(state)
    assert_same(reference[5:], list(itertools.islice(plain, 7)))
    plain.close()
    one = iterator(1)
    one.set_state(state)
    one.start_prefetch()
    assert_same(reference[5:8], list(itertools.islice(one, 3)))
    one.close()


SCRIPT = """
import sys

import jax
import numpy as np

from mplug_jax.data.pipeline import train_iterator

print("main runs")


class Numbers:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"id": str(index), "image_id": index}


def make_example(record, rng):
    loaded = any(name.partition(".")[0] in ("jax", "jaxlib") for name in sys.modules)
    try:
        import jax.numpy
    except ImportError:
        return {"jax": np.bool_(loaded), "importable": np.False_}
    return {"jax": np.bool_(loaded), "importable": np.True_}


assert "jax" in sys.modules
iterator = train_iterator([(Numbers(), 1.0)], make_example, seed=0, batch_size=4, workers=2)
batches = [next(iterator) for _ in range(4)]
print("in workers:", any(b["jax"].any() or b["importable"].any() for b in batches))
"""


def test_workers_of_a_script_that_imports_jax_do_without(tmp_path):
    """Neither is the script run again in the workers, though it has no guard, nor does an
    iterator that is never closed make noise at exit."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["main runs", "in workers: False", ""]
    assert done.stderr == ""


def test_the_data_package_needs_no_jax():
    """Grain, which the pipeline needs, imports jax where it can; all the rest does not."""
    light = "; ".join(f"import mplug_jax.data.{name}" for name in LIGHT)
    code = textwrap.dedent(f"""
        import sys
        {light}
        assert "jax" not in sys.modules
        from mplug_jax.data.worker import JaxBlocker
        sys.meta_path.insert(0, JaxBlocker())
        import mplug_jax.data.pipeline
        assert "jax" not in sys.modules
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr


ALONE = """
import multiprocessing
import os
import signal
import sys

import numpy as np

from mplug_jax.data.pipeline import train_iterator


class Numbers:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"number": index}


def example(record, rng):
    return {"number": np.int32(record["number"])}


def main():
    settings = {"seed": 0, "batch_size": 4}
    with_workers = train_iterator([(Numbers(), 1.0)], example, **settings, workers=1)
    without = train_iterator([(Numbers(), 1.0)], example, **settings)
    next(with_workers)
    next(without)
    children = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        for child in children:
            os.kill(child.pid, number)
    for _ in range(20):
        np.testing.assert_array_equal(next(with_workers)["number"], next(without)["number"])
    print(*(child.pid for child in children), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
"""


def test_workers_end_with_the_training_process_and_by_no_signal_to_the_group(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    # Workers that live on keep the pipe open: what they are is not waited for through it.
    told = tmp_path / "told"
    with told.open("w") as stdout:
        result = subprocess.run(
            [sys.executable, script],
            stdout=stdout,
            timeout=300,
            env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        )
    assert result.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in told.read_text().split()]
    assert workers
    deadline = time.monotonic() + 60
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


def _lives(pid):
    """Whether the process runs; one that has ended may still wait for somebody to ask how."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
