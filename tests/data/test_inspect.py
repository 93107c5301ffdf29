"""The report on a config's data: on drawn scenes, and on files with every kind of fault in them."""

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mplug_jax import inspect_data
from mplug_jax.config import ConfigError, caption_eval, defaults, grounding_eval
from mplug_jax.data.inspection.pages import BOX_COLOUR, as_html, as_text, printable, shown
from mplug_jax.data.inspection.report import bars, report
from mplug_jax.data.inspection.samples import read_tokens
from mplug_jax.data.inspection.survey import evenly
from mplug_jax.data.records import SourceError
from mplug_jax.data.tokenizers import (
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mplug_jax.data.transforms import ImageTransform, decode_image

TEXTS = (
    "a red square and a blue circle",
    "what is on the left of the large green triangle",
    "yes no zero one two small white purple yellow cross",
)
LONG = "a red square " * 12


def small_config(task="caption", **data):
    config = defaults("tiny")
    config.update({"task": task, "batch_size": 4})
    config.model.text.vocab_size = 0
    config.objectives.momentum = 0.0
    config.objectives.itc.update({"alpha": 0.0, "queue_size": 0})
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.0
    config.data.tokenizer.update({"kind": "sentencepiece", "path": "", "vocab_size": 60})
    config.data.update({"text_length": 16, "target_length": 16, **data})
    return config


def scenes(split, *fields, size=12):
    fields = {"fields": fields} if fields else {}
    return {"kind": "scenes", "level": "easy", "split": split, "size": size, **fields}


@pytest.fixture
def workdir(tmp_path):
    """Where a run has left its tokenizer."""
    folder = tmp_path / "run"
    train_sentencepiece(iter(TEXTS), folder / SENTENCEPIECE_FILE, 60)
    return folder


@pytest.fixture
def root(tmp_path):
    """Six pictures for training, of which one is broken; two held out, of which one is a copy of
    `train/2.png` under another name, and in another format."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in [f"train/{i}.png" for i in range(6)] + ["held/new.png", "held/twin.bmp"]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file)
    Image.open(folder / "train/2.png").save(folder / "held/twin.bmp")
    (folder / "train/4.png").write_bytes((folder / "train/4.png").read_bytes()[:200])
    rows = [{"image": f"train/{i}.png", "captions": ["a red square"] * 2} for i in range(6)]
    rows[3]["captions"] = [LONG]
    text = "\n".join(map(json.dumps, rows)) + '\n{"image": "train/5.png", "captions": [""]}'
    (folder / "train.jsonl").write_text(text)
    held = [{"image": name, "captions": ["a blue circle"]} for name in ("held/new.png",)]
    held += [{"image": name, "captions": ["a star"]} for name in ("held/twin.bmp", "train/0.png")]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    return folder


def file_config(root):
    config = small_config(root=str(root), train=({"kind": "jsonl", "path": "train.jsonl"},))
    held_out = {"kind": "jsonl", "path": "held.jsonl"}
    with config.evals.unlocked():
        config.evals.caption = caption_eval(held_out, limit=2, max_length=8)
    return config


class Page(HTMLParser):
    """The texts of a document, its pictures, and what it asks for from elsewhere."""

    def __init__(self, document):
        super().__init__()
        self.texts, self.pictures, self.links, self.warnings = [], [], [], []
        self._warning = False
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._warning = given.get("class") == "warning"
        for name in ("src", "href"):
            if (link := given.get(name)) is None:
                continue
            kind, _, content = link.partition(",")
            if kind == "data:image/png;base64":
                self.pictures.append(Image.open(io.BytesIO(base64.b64decode(content))))
            else:
                self.links.append(link)

    def handle_data(self, data):
        if data.strip():
            (self.warnings if self._warning else self.texts).append(data.strip())


def test_the_faults_of_files_are_named(root, workdir):
    config = file_config(root)
    findings = inspect_data.inspect(config, str(workdir), samples=6, hashed=6)
    train, held_out = findings.surveys

    assert (len(train.of.source), train.counts["captions"], len(train.paths)) == (6, 11, 6)
    assert (len(held_out.of.source), held_out.counts["captions"]) == (3, 3)
    assert train.unusable == [(f"{root}/train.jsonl:7", "caption 0 is empty")]
    (failed,) = findings.sampled[0].failures
    assert failed[0] == "train/4.png" and "cannot be decoded" in failed[1]
    assert findings.sampled[0].tried == 6 and findings.sampled[0].pictures == 5

    by_path, by_pixels = findings.overlaps
    assert (by_path.by, by_path.count) == ("path", 1)
    assert by_path.examples == [(f"{root}/train/0.png", "train/0.png", "train/0.png")]
    assert (by_pixels.by, by_pixels.count) == ("pixels", 2)
    assert ("the same pixels", "train/2.png", "held/twin.bmp") in by_pixels.examples

    tokenizer = SentencePieceTokenizer(workdir / SENTENCEPIECE_FILE)
    length = 2 + sum(map(len, tokenizer.words(LONG)))
    assert length > 16
    assert train.longest["captions"] == [(length, "train/3.png", LONG.strip())]
    assert train.lengths["captions"].total() == 11 and train.lengths["captions"][length] == 1

    for page in (as_text("data", report(findings)), as_html("data", report(findings))):
        for named in ("train.jsonl:7", "caption 0 is empty", "train/4.png", "held/twin.bmp"):
            assert named in page
        assert "1 of 11 captions (9.1%) are cut at 16 tokens, data.target_length" in page
        assert "1 of 7 records are left out" in page and "max_bad_fraction=0.01 allows" in page
        assert "pixels of 6 of 6 of data.train[0], 3 of 3 of evals.caption" in page


def test_samples_are_what_the_model_gets(root, workdir):
    config = file_config(root)
    findings = inspect_data.inspect(config, str(workdir), samples=6, hashed=0)
    assert findings.prints == [] and [overlap.by for overlap in findings.overlaps] == ["path"]
    shown_samples = {sample.record_id: sample for sample in findings.sampled[0].shown}
    assert sorted(shown_samples) == [f"train/{i}.png" for i in (0, 1, 2, 3, 5)]
    short, cut = shown_samples["train/0.png"], shown_samples["train/3.png"]
    assert short.given == [("captions", "a red square")]
    assert short.made == [("caption", "a red square [SEP]")] and short.warnings == []
    size = config.model.vision.image_size
    assert [picture.shape for picture in short.pictures] == [(*size, 3)]
    # What lost its end has none.
    ((_, text),) = cut.made
    assert LONG.startswith(text) and "[SEP]" not in text
    assert "data.target_length is 16" in cut.warnings[0]

    page = Page(as_html("data", report(findings)))
    assert len(page.pictures) == 5 and page.links == []
    assert all(picture.width >= 192 for picture in page.pictures)
    assert any("cut:" in warning for warning in page.warnings)


def test_boxes_are_drawn_where_the_model_is_told(workdir):
    config = small_config("grounding", train=(scenes("train", "phrases"),), crop_scale=None)
    config.data.flip = True
    config.finetune.grounding.update({"bins": 17, "appended": True})
    with config.evals.unlocked():
        config.evals.grounding = grounding_eval(scenes("val", "phrases"), limit=4)
    findings = inspect_data.inspect(config, str(workdir), samples=12, hashed=0)
    mirrored = 0
    for sample in findings.sampled[0].shown:
        given = dict(sample.given)
        x1, y1, x2, y2 = (float(side) for side in given["box"].split(", "))
        as_it_is = np.allclose(sample.box, (x1, y1, x2, y2), atol=0.006)
        mirrored += not as_it_is
        assert as_it_is or np.allclose(sample.box, (1 - x2, y1, 1 - x1, y2), atol=0.006)
        image = shown(sample.pictures[0], sample.box)
        left, top = round(sample.box[0] * image.width), round(sample.box[1] * image.height)
        corner = image.getpixel((min(left, image.width - 1), min(top, image.height - 1)))
        assert "#{:02x}{:02x}{:02x}".format(*corner) == BOX_COLOUR
    assert 0 < mirrored < len(findings.sampled[0].shown) == 12
    assert [survey.of.name for survey in findings.surveys] == ["data.train[0]", "evals.grounding"]


@pytest.mark.parametrize(
    ("task", "field", "model"),
    [
        ("vqa", "questions", {}),
        ("nlvr2", "pair", {"classes": 2, "classified": 2}),
        ("snli_ve", "entailment", {"classes": 3}),
        ("pretrain", "captions", {}),
    ],
)
def test_every_task_shows_its_texts_and_labels(task, field, model, workdir):
    config = small_config(task, train=(scenes("train", field, size=6),))
    config.model.update(model)
    config.objectives.itc.queue_size = 0
    findings = inspect_data.inspect(config, str(workdir), samples=6, hashed=2)
    assert findings.sampled[0].failures == [] and findings.overlaps == []
    for index, sample in enumerate(findings.sampled[0].shown):
        record, made = findings.surveys[0].of.source[index], dict(sample.made)
        assert "[SEP]" in made["text"] or sample.warnings
        if task == "vqa":
            assert made["answer"] == f"{dict(sample.given)['answers']} [SEP] (weight 1.00)"
        if task == "nlvr2":
            assert len(sample.pictures) == 2
            assert made["label"] == str(record["pair"]["label"]).lower()
        if task == "snli_ve":
            assert made["label"] == record["entailment"]["label"]
        if task == "pretrain":
            assert {"prefix", "target"} <= made.keys()


def test_drawn_sources_are_read_in_part(workdir, monkeypatch):
    monkeypatch.setattr("mplug_jax.data.inspection.survey.READ_WITH_PICTURES", 5)
    config = small_config("pretrain", train=(scenes("train", size=40),))
    (survey,) = inspect_data.inspect(config, str(workdir), samples=1, hashed=0).surveys
    assert (survey.read, len(survey.of.source)) == (5, 40)
    findings = inspect_data.inspect(config, str(workdir), samples=1, hashed=0, records=9)
    assert findings.surveys[0].read == 9
    assert "counted in 9 of its 40 records" in as_text("data", report(findings))


def test_evenly():
    assert evenly(3, 5) == [0, 1, 2] and evenly(5, 0) == []
    assert evenly(101, 5) == [0, 25, 50, 75, 100]


def test_bars_end_where_texts_begin_to_be_cut():
    lengths = Counter({3: 4, 20: 1, 21: 2, 22: 1, 500: 3})
    made = bars(lengths, room=20)
    assert sum(count for _, count, _ in made) == 11
    assert made[0] == ("3–4", 4, False)
    assert ("19–20", 1, False) in made and ("21–22", 3, True) in made
    assert made[-1] == ("over 40", 3, True)
    assert bars(Counter({5: 1}), room=10) == [("5", 1, False)]


def test_texts_cannot_change_the_page_or_the_terminal():
    assert printable("a\x1b[2Jb\u202e\x00") == "a\\x1b[2Jb\\u202e\\x00"
    assert printable("שלום 👩\u200d👧") == "שלום 👩\u200d👧"
    page = as_html("<script>alert(1)</script>\x1b[2J", [])
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page


def test_tokens_are_read_back_with_their_ends(workdir):
    tokenizer = SentencePieceTokenizer(workdir / SENTENCEPIECE_FILE)
    ids, mask = tokenizer.encode("a red square", 20)
    assert read_tokens(ids[mask], tokenizer) == "a red square [SEP]"
    assert read_tokens(ids[mask][:-1], tokenizer) == "a red square"
    both = [*ids[mask], *ids[mask][1:]]
    assert read_tokens(both, tokenizer) == "a red square [SEP] a red square [SEP]"


def test_mistakes(root, workdir, tmp_path):
    config = file_config(root)
    flags = {"config": "c", "samples": "", "records": "", "hash": "", "workdir": "", "out": ""}
    with pytest.raises(ConfigError, match="--samples=many is no number"):
        inspect_data.main(config, {**flags, "samples": "many"})
    with pytest.raises(ConfigError, match=r"--out=.*a folder that exists"):
        inspect_data.main(config, {**flags, "out": str(tmp_path / "none" / "a.html")})
    with pytest.raises(ConfigError, match="--workdir=nowhere"):
        inspect_data.main(config, {**flags, "workdir": "nowhere"})
    config.data.train = ({"kind": "jsonl", "path": "lost.jsonl"},)
    with pytest.raises(SourceError, match=r"there is no file .*lost\.jsonl"):
        inspect_data.inspect(config, str(workdir))


def test_the_pictures_of_a_frozen_encoder_are_not_encoded(root, workdir):
    """They are shown as it sees them: whole, and with two variants sometimes mirrored."""
    config = file_config(root)
    config.data.cached_variants = 2
    findings = inspect_data.inspect(config, str(workdir), samples=6, hashed=0)
    transform = ImageTransform(config.model.vision.image_size)
    for sample in findings.sampled[0].shown:
        whole = transform(decode_image(root / sample.record_id), None)
        (picture,) = sample.pictures
        assert any(np.array_equal(picture, side) for side in (whole, whole[:, ::-1]))


def test_no_jax_is_needed_but_by_the_command():
    modules = ("inspect", *(f"inspection.{name}" for name in ("overlaps", "pages", "samples")))
    imports = "; ".join(f"import mplug_jax.data.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


CONFIG = """
from tests.data.test_inspect import file_config

def get_config():
    return file_config({root!r})
"""


@pytest.mark.slow
def test_command(root, workdir, tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG.format(root=str(root)))
    out = tmp_path / "report.html"
    arguments = [f"--config={tmp_path}/mine.py", f"--workdir={workdir}", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "mplug_jax.data.inspect", *arguments, "--hash=all", "--samples=6"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The data of mine\n") and "held/twin.bmp" in done.stdout
    assert "Traceback" not in done.stderr and "skipped" not in done.stderr
    page = Page(out.read_text(encoding="utf-8"))
    assert len(page.pictures) == 5 and "The data of mine" in page.texts
    rates = re.findall(r"decoded and augmented +5 +[0-9,]+\n", done.stdout)
    assert len(rates) == 1
