"""A trained model on your own pictures: ``python -m mplug_jax.predict COMMAND … --checkpoint=RUN``.

RUN is a workdir, one of its checkpoints, or a folder that ``mplug_jax.convert`` wrote; its
config.json says what model it is. PICTURES are a file, a folder, or a pattern such as
'photos/*.jpg'. See docs/usage.md.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.command_line import end_with_message
from mplug_jax.config import config_errors
from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import decode_image
from mplug_jax.prediction.grounding import draw_box, locator
from mplug_jax.prediction.matching import Match, Matcher
from mplug_jax.prediction.model import COMMANDS, Model, PredictionError, load_model
from mplug_jax.prediction.pictures import boxed_files, find_pictures
from mplug_jax.prediction.writing import answer_ranker, answerer, captioner, read_answers
from mplug_jax.tasks.forward import MEMORIES

Arguments = argparse.Namespace
# An object for --json, and its lines for a person.
Said = tuple[dict[str, Any], Sequence[str]]


def caption(model: Model, given: Arguments) -> int:
    """A caption, or several, for each picture."""
    write = captioner(
        model,
        memory=given.memory,
        prompt=given.prompt,
        beams=given.beams,
        samples=given.samples,
        max_length=given.max_length,
        seed=given.seed,
    )

    def said(_: str, pixels: np.ndarray) -> Iterator[Said]:
        captions = write(pixels)
        yield {"captions": captions}, captions

    return _for_each_picture(given, said)


def vqa(model: Model, given: Arguments) -> int:
    """An answer to a question, or the answers of a list in order."""
    asked = {"question": given.question}
    if given.answers:
        rank = answer_ranker(model, read_answers(given.answers))
    else:
        write = answerer(model, beams=given.beams, max_length=given.max_length)

    def said(_: str, pixels: np.ndarray) -> Iterator[Said]:
        if not given.answers:
            answer = write(pixels, given.question)
            yield asked | {"answer": answer}, [answer]
            return
        ranking = rank(pixels, given.question)[: given.top]
        found = [{"answer": answer, "probability": p} for answer, p in ranking]
        lines = [f"{p:.3f}  {answer}" for answer, p in ranking]
        yield asked | {"answer": ranking[0][0], "ranking": found}, lines

    return _for_each_picture(given, said)


def match(model: Model, given: Arguments) -> int:
    """How well each text fits a picture."""
    matcher = Matcher(model)

    def said(_: str, pixels: np.ndarray) -> Iterator[Said]:
        return _matches(matcher.texts(pixels, given.texts), "text")

    return _for_each_picture(given, said)


def retrieve(model: Model, given: Arguments) -> int:
    """The best of several pictures for a text, or the best texts of a file for a picture."""
    matcher = Matcher(model)
    if given.texts:
        matches = matcher.best_texts(decode_image(given.query), given.texts, given.top)
        asked, item = {"picture": given.query}, "text"
    else:
        matches, problems = matcher.best_pictures(given.query, given.pictures, given.top)
        for problem in problems:
            _complain(f"left out: {problem}")
        asked, item = {"text": given.query}, "picture"
    for values, lines in _matches(matches, item):
        _say(given, asked | values, lines)
    return 0


def ground(model: Model, given: Arguments) -> int:
    """The box of a phrase in pixels, and the picture with the box drawn."""
    locate = locator(model)

    def said(path: str, pixels: np.ndarray) -> Iterator[Said]:
        box = locate(pixels, given.phrase)
        if path in given.boxed:
            draw_box(pixels, box, given.boxed[path])
        found = {"phrase": given.phrase, "box": box}
        yield found, [" ".join(f"{value:.1f}" for value in box)]

    return _for_each_picture(given, said)


RUNS: dict[str, Callable[[Model, Arguments], int]] = dict(
    zip(COMMANDS, (caption, vqa, match, retrieve, ground), strict=True)
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m mplug_jax.predict", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {name: commands.add_parser(name, help=RUNS[name].__doc__) for name in COMMANDS}
    for command in made.values():
        command.add_argument(
            "--checkpoint", required=True, help="Workdir, checkpoint or converted."
        )
        command.add_argument(
            "--tokenizer", default="", help="File, if the run has none of its own."
        )
        command.add_argument("--json", action="store_true", help="A JSON object a line.")
    made["caption"].add_argument("pictures", nargs="+", metavar="PICTURES")
    made["caption"].add_argument("--memory", choices=MEMORIES, help="Default: as it was trained.")
    made["caption"].add_argument("--prompt", help="What captions continue; default: as trained.")
    made["caption"].add_argument("--samples", type=_positive, default=0, help="Draw so many texts.")
    made["caption"].add_argument("--seed", type=int, default=0, help="Of the samples.")
    for name in ("caption", "vqa"):
        made[name].add_argument("--beams", type=_positive, default=5)
        made[name].add_argument("--max_length", type=_positive, help="Tokens; default: as trained.")
    for name in ("vqa", "match", "ground"):
        made[name].add_argument("pictures", nargs=1, metavar="PICTURES")
    made["vqa"].add_argument("question", metavar="QUESTION")
    made["vqa"].add_argument("--answers", help="JSON list of answers to rank.")
    made["match"].add_argument("texts", nargs="+", metavar="TEXT")
    made["retrieve"].add_argument("query", metavar="TEXT|PICTURE")
    made["retrieve"].add_argument(
        "among", metavar="PICTURES|FILE", help="Or a file with a text a line."
    )
    for name in ("vqa", "retrieve"):
        made[name].add_argument("--top", type=_positive, default=5, help="How many are shown.")
    made["ground"].add_argument("phrase", metavar="PHRASE")
    made["ground"].add_argument("--out", help="File to draw the box into; a folder for several.")
    return top


def run(argv: Sequence[str]) -> int:
    """Runs a command (without the program's name); returns the exit status.

    Raises:
      PredictionError, BadSample, CheckpointError, ConfigError, SourceError: a mistake of the user.
    """
    given = parser().parse_args(argv)
    _find_files(given)
    with config_errors():
        model = load_model(given.checkpoint, given.command, given.tokenizer)
    return 2 if RUNS[given.command](model, given) else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _find_files(given: Arguments) -> None:
    """Looks up `pictures`, for `retrieve` the `texts`, for `ground` the files to write, `boxed`:
    all that can be wrong before the model is loaded."""
    if given.command == "retrieve":
        given.texts = _lines(Path(given.among)) if Path(given.among).is_file() else []
        if given.texts:
            return
        if not Path(given.among).exists() and not glob.has_magic(given.among):
            raise PredictionError(
                f"{given.among} does not exist: give a folder of pictures for a text, or for a "
                "picture a file with a text a line."
            )
        given.pictures = [given.among]
    given.pictures = find_pictures(given.pictures)
    if given.command == "ground":
        given.boxed = boxed_files(given.pictures, given.out) if given.out else {}


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(f"{file} cannot be read as texts, one a line: {error}.") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise PredictionError(f"{file} holds no texts; write one a line.")
    return texts


def _for_each_picture(given: Arguments, said: Callable[[str, np.ndarray], Iterable[Said]]) -> int:
    """Prints what is said of the path and the pixels of each picture, and names the picture where
    there are several; returns how many could not be read."""
    failed = 0
    for path in given.pictures:
        try:
            pixels = decode_image(path)
        except BadSample as error:
            _complain(error)
            failed += 1
            continue
        for values, lines in said(path, pixels):
            named = [f"{path}: {line}" for line in lines] if len(given.pictures) > 1 else lines
            _say(given, {"picture": path, **values}, named)
    return failed


def _matches(matches: Iterable[Match], item: str) -> Iterator[Said]:
    for found in matches:
        values = {"probability": found.probability, "similarity": found.similarity}
        shown = "  -  " if found.probability is None else f"{found.probability:.3f}"
        yield {item: found.item} | values, [f"{shown}  {found.similarity:+.3f}  {found.item}"]


def _say(given: Arguments, values: dict[str, Any], lines: Sequence[str]) -> None:
    """JSON or lines for a person, at once: the next picture may take a while."""
    print(json.dumps(values, ensure_ascii=False) if given.json else "\n".join(lines), flush=True)


def _complain(problem: object) -> None:
    print(f"error: {problem}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    try:
        sys.exit(run(sys.argv[1:]))
    except ValueError as failure:
        end_with_message(failure)
