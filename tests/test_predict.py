"""The commands on a model of random parameters, judged by direct calls of the model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import decode_image
from mplug_jax.predict import run
from mplug_jax.prediction import grounding as grounding_lib
from mplug_jax.prediction.grounding import draw_box, locator
from mplug_jax.prediction.matching import ROWS, Matcher
from mplug_jax.prediction.model import Model, PredictionError, load_model
from mplug_jax.prediction.writing import answer_ranker, answerer, captioner
from mplug_jax.training.checkpoint import CheckpointError
from tests.small_runs import TEXTS, random_checkpoint, small_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("runs") / "pretrained", small_config())


@pytest.fixture(scope="module")
def grounding(tmp_path_factory) -> Path:
    config = small_config("grounding")
    return random_checkpoint(tmp_path_factory.mktemp("runs") / "grounding", config)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """More than a batch of pictures of different sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    paths = []
    for number in range(ROWS + 2):
        blocks = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(blocks).resize((40 + number, 30), Image.Resampling.NEAREST)
        paths.append(str(folder / f"{number:02}.png"))
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def model(pretrained) -> Model:
    return load_model(str(pretrained), "match")


@pytest.fixture(scope="module")
def matcher(model) -> Matcher:
    return Matcher(model)


@pytest.fixture(scope="module")
def call(model):
    """A model method, compiled, by name."""
    methods = {}

    def call(name, *args):
        if name not in methods:
            methods[name] = jax.jit(
                lambda params, *args: model.setup.model.apply(
                    {"params": params}, *args, method=name
                ),
            )
        return methods[name](model.params, *args)

    return call


def tokens(model: Model, text: str) -> list[int]:
    return [token for word in model.setup.tokenizer.words(text) for token in word]


def read(model: Model, text: str, length: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a text, padded further than the model was trained to read."""
    t = model.setup.tokenizer
    ids = [t.cls_id, *tokens(model, text), t.sep_id]
    mask = np.arange(length) < len(ids)
    return np.array([ids + [t.pad_id] * (length - len(ids))]), mask[None]


def shown(model: Model, path: str) -> np.ndarray:
    size = model.setup.image_size[::-1]
    return np.asarray(Image.open(path).resize(size, Image.Resampling.BICUBIC))[None]


def greedy_text(call, model: Model, path: str, start: list[int], length: int, text: str | None):
    """Token by token with teacher-forced passes; ``text`` None reads the image alone."""
    t = model.setup.tokenizer
    memory = call("encode_image", shown(model, path))
    mask = np.ones(memory.shape[:2], bool)
    if text is not None:
        ids, seen = read(model, text)
        both = call("fuse", memory, call("encode_text", ids, seen), seen)
        memory, mask = call("memory", *both, seen)
    ids = list(start)
    for _ in range(length):
        padded = np.array([ids + [t.pad_id] * (16 - len(ids))])
        logits = np.array(call("decode", padded, memory, mask)[0, len(ids) - 1])
        logits[[t.cls_id, t.pad_id]] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == t.sep_id:
            break
    return t.decode(ids[len(start) :])


def compiled(caplog, function, *args) -> list[str]:
    """What a call compiles."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        function(*args)
    return [m for m in (r.getMessage() for r in caplog.records) if m.startswith("Compiling")]


def test_match_is_the_models_own_probability_and_similarity(call, model, matcher, pictures):
    found = matcher.texts(decode_image(pictures[0]), TEXTS[:2])
    image = call("encode_image", shown(model, pictures[0]))
    for text, each in zip(TEXTS[:2], found, strict=True):
        ids, mask = read(model, text)
        embeds = call("encode_text", ids, mask)
        logits = np.asarray(call("match", call("fuse", image, embeds, mask)[1]))[0]
        similarity = np.vdot(call("project_image", image), call("project_text", embeds))
        assert each.item == text
        assert each.probability == pytest.approx(1 / (1 + np.exp(logits[0] - logits[1])), abs=1e-4)
        assert each.similarity == pytest.approx(similarity, abs=1e-4)
    assert found[0].probability != pytest.approx(found[1].probability, abs=1e-3)


def test_the_best_pictures_are_those_that_match_most(matcher, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    found, problems = matcher.best_pictures(TEXTS[0], [str(bad), *pictures], ROWS + 2)
    alone = {path: matcher.texts(decode_image(path), TEXTS[:1])[0] for path in pictures}
    order = sorted(pictures, key=lambda path: -alone[path].probability)
    assert [each.item for each in found] == order
    for each in found:
        assert each.probability == pytest.approx(alone[each.item].probability, abs=1e-4)
        assert each.similarity == pytest.approx(alone[each.item].similarity, abs=1e-4)
    assert len(problems) == 1
    assert str(bad) in problems[0]
    assert [each.item for each in matcher.best_pictures(TEXTS[0], pictures, 3)[0]] != order
    with pytest.raises(PredictionError, match=r"None of the pictures can be read: .*bad\.png"):
        matcher.best_pictures(TEXTS[0], [str(bad)], 1)


def test_the_best_texts_are_those_that_match_most(matcher, pictures):
    pixels = decode_image(pictures[3])
    texts = [*TEXTS, *(f"{text} {number}" for number, text in enumerate(TEXTS * 3))]
    found = matcher.best_texts(pixels, texts, len(texts))
    alone = matcher.texts(pixels, texts)
    assert found == sorted(alone, key=lambda each: -each.probability)
    # Of many, fusion judges only the nearest.
    nearest = sorted(alone, key=lambda each: -each.similarity)[:ROWS]
    best = max(nearest, key=lambda each: each.probability)
    assert [each.item for each in matcher.best_texts(pixels, texts, 1)] == [best.item]


def test_without_itm_similarity_alone_ranks(pretrained, pictures, tmp_path):
    config = small_config()
    config.objectives.itm.weight = 0.0
    model = load_model(str(random_checkpoint(tmp_path / "itc", config)), "retrieve")
    found = Matcher(model).best_texts(decode_image(pictures[0]), TEXTS, 3)
    assert [each.probability for each in found] == [None] * 3
    assert found == sorted(found, key=lambda each: -each.similarity)


@pytest.mark.parametrize("memory", ["image", "fused"])
def test_a_caption_of_one_beam_is_the_likeliest_next_tokens(call, model, pictures, memory):
    start = [model.setup.tokenizer.cls_id, *tokens(model, "a red")]
    write = captioner(model, memory=memory, prompt="a red", beams=1, max_length=5)
    text = None if memory == "image" else ""
    for path in pictures[:2]:
        assert write(decode_image(path)) == [greedy_text(call, model, path, start, 5, text)]


def test_an_answer_of_one_beam_reads_the_question(call, model, pictures):
    answer = answerer(model, beams=1, max_length=4)
    start = [model.setup.tokenizer.cls_id]
    for question in TEXTS[3:]:
        wanted = greedy_text(call, model, pictures[0], start, 4, question)
        assert answer(decode_image(pictures[0]), question) == wanted


def test_a_second_picture_of_another_size_compiles_nothing(model, matcher, pictures, caplog):
    first, second = map(decode_image, pictures[:2])
    assert first.shape != second.shape
    write = captioner(model, beams=2, max_length=4)
    assert compiled(caplog, write, first)
    assert compiled(caplog, write, second) == []
    matcher.texts(first, TEXTS[:1])
    assert compiled(caplog, matcher.texts, second, TEXTS[:4]) == []


def test_samples_are_several_and_repeat_with_their_seed(model, pictures):
    pixels = decode_image(pictures[0])
    drawn = captioner(model, samples=6, max_length=6, seed=1)(pixels)
    assert len(drawn) == 6
    assert len(set(drawn)) > 1
    assert captioner(model, samples=6, max_length=6, seed=1)(pixels) == drawn
    assert captioner(model, samples=6, max_length=6, seed=2)(pixels) != drawn


def test_answers_are_ranked_by_their_likelihood(model, pictures):
    answers = ["red", "a blue star", "two"]
    ranking = answer_ranker(model, answers)(decode_image(pictures[0]), TEXTS[3])
    assert sorted(text for text, _ in ranking) == sorted(answers)
    chances = [chance for _, chance in ranking]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) == pytest.approx(1.0, abs=1e-5)
    reversed_list = answer_ranker(model, answers[::-1])(decode_image(pictures[0]), TEXTS[3])
    assert [text for text, _ in reversed_list] == [text for text, _ in ranking]


def test_a_box_is_in_the_pixels_of_its_own_picture(grounding):
    locate = locator(load_model(str(grounding), "ground"))
    # Resized, both look the same to the model.
    narrow, wide = (np.full((30, width, 3), 90, np.uint8) for width in (50, 100))
    box = np.array(locate(narrow, "a red square"))
    assert (box >= 0).all()
    assert (box <= [50, 30, 50, 30]).all()
    assert locate(wide, "a red square") == pytest.approx(box * [2, 1, 2, 1])


def test_the_four_tokens_are_centre_width_and_height(grounding, monkeypatch):
    model = load_model(str(grounding), "ground")
    size = model.setup.tokenizer.vocab_size

    def written(*_, prompt_ids, allowed, max_length, **options):
        assert prompt_ids.tolist() == [size]
        assert np.flatnonzero(allowed).tolist() == list(range(size + 1, size + 18))
        assert max_length == 4
        return jnp.array([[8, 4, 8, 16]]) + size + 1

    monkeypatch.setattr(grounding_lib, "greedy", written)
    # Centre (1/2, 1/4), half as wide and as high as the picture, of which the top is cut off.
    assert locator(model)(np.zeros((40, 80, 3), np.uint8), "a star") == (20.0, 0.0, 60.0, 30.0)


def test_the_box_is_drawn_on_its_own_pixels(pictures, tmp_path):
    pixels, out = decode_image(pictures[0]), tmp_path / "new" / "boxed.png"
    draw_box(pixels, (5.0, 6.0, 20.0, 16.0), str(out))
    drawn = np.asarray(Image.open(out))
    changed = np.argwhere((drawn != pixels).any(axis=-1))
    assert changed.min(axis=0).tolist() == [6, 5]
    assert changed.max(axis=0).tolist() == [15, 19]
    assert (drawn[8:14, 8:17] == pixels[8:14, 8:17]).all()
    with pytest.raises(PredictionError, match="--out="):
        draw_box(pixels, (5.0, 6.0, 20.0, 16.0), str(tmp_path / "boxed.nothing"))


@pytest.mark.parametrize(
    ("task", "command", "said"),
    [
        (
            "pretrain",
            "ground",
            r"no coordinate tokens: .*task='pretrain', so it can caption, vqa, match",
        ),
        ("grounding", "caption", r"not learnt to caption: .*task='grounding', so it can ground"),
        ("vqa", "match", r"not learnt to match: .*it can vqa.*config\.task='retrieval'"),
        ("nlvr2", "vqa", r"task='nlvr2', so predict has no command for that"),
    ],
)
def test_what_a_model_has_not_learnt_is_refused(tmp_path, pretrained, task, command, said):
    run_of = tmp_path / "run"
    (run_of / "checkpoints" / "3" / "state").mkdir(parents=True)
    (run_of / "config.json").write_text(json.dumps(small_config(task).to_dict()))
    with pytest.raises(PredictionError, match=said):
        load_model(str(run_of), command)


def test_clips_are_refused(tmp_path):
    config = small_config("caption")
    config.model.frames = 4
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(PredictionError, match="takes clips of 4 frames; predict reads pictures"):
        load_model(str(tmp_path), "caption")


def test_a_checkpoint_that_lacks_something_is_told(tmp_path, pretrained):
    with pytest.raises(CheckpointError, match=r"--checkpoint=.*nowhere: no checkpoint there"):
        load_model(str(tmp_path / "nowhere"), "caption")
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(str(tmp_path), "caption")
    (tmp_path / "config.json").write_text((pretrained / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no tokenizer file .*tokenizer\.model: copy"):
        load_model(str(tmp_path), "caption")


def test_too_long_a_text_is_told(model):
    with pytest.raises(PredictionError, match=r"--max_length=64 exceed the 64 positions"):
        captioner(model, prompt="a red", max_length=64)


def test_one_picture_that_cannot_be_read_is_named_and_the_others_are_captioned(
    pretrained, pictures, tmp_path, capsys
):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    texts = tmp_path / "texts.txt"
    texts.write_text("a red star")
    chosen = [pictures[0], str(bad), pictures[1]]
    options = [f"--checkpoint={pretrained}", "--beams=1", "--max_length=3"]
    assert run(["caption", *chosen, *options]) == 2
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.out.splitlines()] == [pictures[0], pictures[1]]
    assert said.err.startswith(f"error: {bad}: cannot be decoded")
    assert said.err.count("\n") == 1
    assert run(["vqa", str(bad), "what colour", f"--checkpoint={pretrained}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {bad}: cannot be decoded")
    with pytest.raises(BadSample, match=r"bad\.jpg: cannot be decoded"):
        run(["retrieve", str(bad), str(texts), f"--checkpoint={pretrained}"])


def test_commands_print_lines_or_json(pretrained, grounding, pictures, tmp_path, capsys):
    texts, answers = tmp_path / "texts.txt", tmp_path / "answers.json"
    texts.write_text("\n".join(TEXTS) + "\n\n")
    answers.write_text('["red", "two"]')
    here = [f"--checkpoint={pretrained}", "--json"]

    def printed(*arguments):
        assert run(list(arguments)) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    ranked = printed("vqa", pictures[0], TEXTS[3], f"--answers={answers}", *here)[0]
    assert {each["answer"] for each in ranked["ranking"]} == {"red", "two"}
    assert ranked["answer"] == ranked["ranking"][0]["answer"]
    found = printed("retrieve", pictures[0], str(texts), "--top=2", *here)
    assert len(found) == 2
    assert {each["text"] for each in found} < set(TEXTS)
    found = printed("retrieve", TEXTS[0], str(Path(pictures[0]).parent), "--top=3", *here)
    assert len(found) == 3
    assert {each["picture"] for each in found} < set(pictures)
    out = tmp_path / "boxed.png"
    box = printed(
        "ground", pictures[0], "a star", f"--out={out}", f"--checkpoint={grounding}", "--json"
    )
    assert len(box[0]["box"]) == 4
    assert Image.open(out).size == Image.open(pictures[0]).size
    with pytest.raises(PredictionError, match="does not exist: give a folder of pictures"):
        run(["retrieve", TEXTS[0], str(tmp_path / "nowhere"), *here])


def test_every_command_takes_several_pictures(pretrained, grounding, pictures, tmp_path, capsys):
    some = Path(pictures[0]).parent / "0[0-2].png"
    short = ["--beams=1", "--max_length=2"]

    def printed(*arguments, checkpoint=pretrained):
        assert run([*arguments, f"--checkpoint={checkpoint}"]) == 0
        return capsys.readouterr().out.splitlines()

    for command, most in (("caption", short), ("vqa", [TEXTS[3], *short]), ("match", TEXTS[:2])):
        lines = printed(command, str(some), *most)
        each = 2 if command == "match" else 1
        assert [line.split(": ")[0] for line in lines] == [
            path for path in pictures[:3] for _ in range(each)
        ]
        alone = printed(command, pictures[1], *most)
        assert alone == [line.split(": ", 1)[1] for line in lines[each : 2 * each]]
    out = tmp_path / "boxed"
    lines = printed("ground", str(some), "a star", f"--out={out}", checkpoint=grounding)
    assert [line.split(": ")[0] for line in lines] == pictures[:3]
    assert sorted(path.name for path in out.iterdir()) == ["00.png", "01.png", "02.png"]
    found = printed("retrieve", TEXTS[0], str(some), "--top=9")
    assert {line.split()[2] for line in found} == set(pictures[:3])


@pytest.mark.slow
def test_the_command_ends_with_one_message(pretrained, pictures):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mplug_jax.predict", "ground", pictures[0], "a star"),
            f"--checkpoint={pretrained}",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: The model of")
    assert "has no coordinate tokens" in result.stderr
    assert "Traceback" not in result.stderr
