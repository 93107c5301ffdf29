"""Sources by name."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import pretrain_base, pretrain_large
from mplug_jax.data.records import SourceError
from mplug_jax.data.sources import build_mixture, build_source
from tests.data.sources.test_tar_files import samples, write_tar

SCENES = {"kind": "scenes", "level": "easy", "split": "val"}


@pytest.fixture
def root(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"caption {i}"} for i in range(6)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


def test_scenes(root):
    source = build_source({**SCENES, "size": 5})
    assert len(source) == 5
    record = source[0]
    assert record["image"].dtype == np.uint8 and record["image"].ndim == 3
    assert record["captions"]
    same, other = build_source({**SCENES, "seed": 1}), build_source(SCENES, seed=1)
    np.testing.assert_array_equal(same[0]["image"], other[0]["image"])


def test_files(root):
    for kind in ("captions", "retrieval"):
        source = build_source({"kind": kind, "path": "train.json", "split": None}, root)
        assert len(source) == 6 and source[5]["captions"] == ["caption 5"]


def test_bad_records_allowed(root):
    rows = [{"image": "a.png", "caption": caption} for caption in ("x", "", "y", "z")]
    (root / "some_bad.json").write_text(json.dumps(rows))
    spec = {"kind": "captions", "path": "some_bad.json"}
    with pytest.raises(SourceError, match="1 of 4"):
        build_source(spec, root)
    assert len(build_source(spec, root, max_bad_fraction=0.3)) == 3
    [(source, _)] = build_mixture({**spec, "max_bad_fraction": 0.3}, root)
    assert len(source) == 3
    with pytest.raises(SourceError, match=r"max_bad_fraction=0\.1 "):
        build_mixture([spec], root, max_bad_fraction=0.1)


def test_errors_name_the_nearest_choice(root):
    with pytest.raises(ValueError, match=r"'scene'; did you mean 'scenes'\?.*captions, grounding"):
        build_source({"kind": "scene"})
    with pytest.raises(ValueError, match=r"'levle'; did you mean 'level'\?"):
        build_source({**SCENES, "levle": "easy"})
    with pytest.raises(ValueError, match="'box_format'"):
        build_source({"kind": "captions", "path": "train.json", "box_format": "xywh"}, root)
    with pytest.raises(ValueError, match="needs 'level' and 'split'"):
        build_source({"kind": "scenes"})
    with pytest.raises(ValueError, match="needs 'path'"):
        build_source({"kind": "captions"}, root)
    with pytest.raises(ValueError, match="None"):
        build_source({})
    with pytest.raises(SourceError, match=r"config\.data\.root"):
        build_source({"kind": "captions", "path": "missing.json"}, root)


def test_mixture_weights(root):
    files = {"kind": "captions", "path": "train.json"}
    scenes = {**SCENES, "size": 18}
    assert [weight for _, weight in build_mixture([files, scenes], root)] == [6.0, 18.0]
    given = build_mixture([{**files, "weight": 3}, {**scenes, "weight": 1}], root)
    assert [(len(source), weight) for source, weight in given] == [(6, 3.0), (18, 1.0)]
    with pytest.raises(ValueError, match="weight"):
        build_mixture([{**files, "weight": 3}, scenes], root)
    with pytest.raises(ValueError, match="weight"):
        build_mixture({**files, "weight": 0}, root)


def test_a_single_spec_may_be_a_dict_or_a_configdict(root):
    for spec in ({**SCENES, "size": 4}, ConfigDict({**SCENES, "size": 4})):
        [(source, weight)] = build_mixture(spec)
        assert len(source) == weight == 4


@pytest.mark.parametrize("config", [pretrain_base, pretrain_large])
def test_the_papers_mixture_has_its_shares_whatever_could_be_downloaded(root, config):
    for number, name in enumerate(("sbu", "cc3m", "cc12m"), start=1):
        write_tar(root / name / "00000.tar", samples(0, number))
    for name in ("coco", "vg"):
        (root / name).mkdir()
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
        (root / f"{name}.json").write_text('[{"image": "a.png", "caption": "x"}]')
    mixture = build_mixture(config.get_config().data.train, root)
    assert [len(source) for source, _ in mixture] == [1, 1, 1, 2, 3]
    total = sum(weight for _, weight in mixture)
    shares = [round(weight / total, 3) for _, weight in mixture]
    assert shares == [0.037, 0.051, 0.057, 0.197, 0.658]
