"""The command, and the pipeline where Apache Beam is installed."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("packed", Path(__file__).with_name("packed.py"))
packed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packed)

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(
    not HAS_BEAM, reason="Apache Beam is missing: pip install 'mplug_jax[pack]'"
)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def root(tmp_path):
    packed.write_pictures(tmp_path)
    return tmp_path


def pack(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mplug_jax.data.pack", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def given(root, out, **flags):
    flags = {"source": packed.spec("rows"), "exclude": packed.spec("test"), "root": root} | flags
    flags |= {"out": out, "max_side": 64}
    return [f"--{name}={value}" for name, value in flags.items()]


def digests(out):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("data.*")}


@needs_beam
@pytest.mark.slow
def test_beam_writes_what_is_written_without_it_however_many_workers(root):
    job = packed.job_of(root)
    packed.pack_here(job, root / "here", 4)
    expected = packed.finished(job, root / "here")
    parallel = ["--", "--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    for name, options in (("one", []), ("two", parallel)):
        done = pack(*given(root, root / name, shards=4), *options)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((root / name / "manifest.json").read_text())
        assert manifest == expected
        assert digests(root / name) == digests(root / "here")
        assert "8 packed" in done.stdout and f"{root / name}'}},)" in done.stdout
    again = pack(*given(root, root / "one", shards=4))
    assert again.returncode == 0 and "0 of 4 shards to be written" in again.stdout
    changed = pack(*given(root, root / "one", shards=3))
    assert changed.returncode == 2 and "shards was 4, now 3" in changed.stderr


@needs_beam
@pytest.mark.slow
def test_each_source_of_a_config_has_a_folder_of_its_own(root):
    config = root / "two.py"
    specs = [{**json.loads(packed.spec(n)), "weight": w} for n, w in (("rows", 3), ("test", 1))]
    specs[1]["transforms"] = {"flip": False}
    config.write_text(
        "from mplug_jax.config import defaults\n\n\ndef get_config():\n"
        f"    config = defaults('base')\n    config.data.train = {tuple(specs)!r}\n"
        "    return config\n"
    )
    out = root / "out"
    done = pack(f"--config={config}", f"--config.data.root={root}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    mixed_in = "'weight': 1, 'transforms': {'flip': False}}"
    assert f"'path': '{out}/1-jsonl', {mixed_in}" in done.stdout
    for name, count in (("0-jsonl", 9), ("1-jsonl", 1)):
        assert json.loads((out / name / "manifest.json").read_text())["counts"]["packed"] == count


@pytest.mark.skipif(HAS_BEAM, reason="Apache Beam is installed here")
def test_without_beam_the_command_says_what_to_install(root):
    done = pack(*given(root, root / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install 'mplug_jax[pack]'" in done.stderr
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "--config=FILE or --source=JSON"),
        (["--source={}", "--out=gs://bucket/x"], "is a URL: name a folder"),
        (["--source={}", "--out=x", "--runner=Spark"], "Unknown command line flag 'runner'"),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    done = pack(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
