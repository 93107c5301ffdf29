"""A trained model on your own pictures: ``python -m mplug_jax.predict COMMAND … --checkpoint=RUN``.

RUN is a workdir, one of its checkpoints, or a folder that ``mplug_jax.convert`` wrote; its
config.json says what model it is. See docs/usage.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from PIL import Image

from mplug_jax.command_line import end_with_message
from mplug_jax.config import config_errors
from mplug_jax.data.records import BadSample
from mplug_jax.data.transforms import decode_image
from mplug_jax.prediction.grounding import draw_box, locator
from mplug_jax.prediction.matching import Match, Matcher
from mplug_jax.prediction.model import COMMANDS, Model, PredictionError, load_model
from mplug_jax.prediction.writing import answer_ranker, answerer, captioner, read_answers
from mplug_jax.tasks.forward import MEMORIES

Arguments = argparse.Namespace


def caption(model: Model, given: Arguments) -> int:
    """A caption, or several, for each picture; returns how many pictures could not be read."""
    write = captioner(
        model,
        memory=given.memory,
        prompt=given.prompt,
        beams=given.beams,
        samples=given.samples,
        max_length=given.max_length,
        seed=given.seed,
    )
    failed = 0
    for path in given.pictures:
        try:
            captions = write(decode_image(path))
        except BadSample as error:
            _complain(error)
            failed += 1
            continue
        _say(given, {"picture": path, "captions": captions}, _named(given.pictures, path, captions))
    return failed


def vqa(model: Model, given: Arguments) -> int:
    """An answer to a question, or the answers of a list in order."""
    pixels = decode_image(given.picture)
    asked = {"picture": given.picture, "question": given.question}
    if not given.answers:
        write = answerer(model, beams=given.beams, max_length=given.max_length)
        answer = write(pixels, given.question)
        _say(given, asked | {"answer": answer}, [answer])
        return 0
    ranking = answer_ranker(model, read_answers(given.answers))(pixels, given.question)[: given.top]
    found = [{"answer": answer, "probability": p} for answer, p in ranking]
    lines = [f"{p:.3f}  {answer}" for answer, p in ranking]
    _say(given, asked | {"answer": ranking[0][0], "ranking": found}, lines)
    return 0


def match(model: Model, given: Arguments) -> int:
    """How well each text fits a picture."""
    matches = Matcher(model).texts(decode_image(given.picture), given.texts)
    _say_matches(given, matches, "text", {"picture": given.picture})
    return 0


def retrieve(model: Model, given: Arguments) -> int:
    """The best pictures of a folder for a text, or the best texts of a file for a picture."""
    where = Path(given.among)
    if where.is_dir():
        matches, problems = Matcher(model).best_pictures(given.query, _pictures(where), given.top)
        for problem in problems:
            _complain(f"left out: {problem}")
        _say_matches(given, matches, "picture", {"text": given.query})
        return 0
    if not where.is_file():
        raise PredictionError(
            f"{where} does not exist: give a folder of pictures for a text, or for a picture a "
            "file with a text a line."
        )
    pixels = decode_image(given.query)
    matches = Matcher(model).best_texts(pixels, _lines(where), given.top)
    _say_matches(given, matches, "text", {"picture": given.query})
    return 0


def ground(model: Model, given: Arguments) -> int:
    """The box of a phrase in pixels, and the picture with the box drawn."""
    pixels = decode_image(given.picture)
    box = locator(model)(pixels, given.phrase)
    if given.out:
        draw_box(pixels, box, given.out)
    found = {"picture": given.picture, "phrase": given.phrase, "box": box}
    _say(given, found, [" ".join(f"{value:.1f}" for value in box)])
    return 0


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
    made["caption"].add_argument("pictures", nargs="+", metavar="PICTURE")
    made["caption"].add_argument("--memory", choices=MEMORIES, help="Default: as it was trained.")
    made["caption"].add_argument("--prompt", help="What captions continue; default: as trained.")
    made["caption"].add_argument("--samples", type=_positive, default=0, help="Draw so many texts.")
    made["caption"].add_argument("--seed", type=int, default=0, help="Of the samples.")
    for name in ("caption", "vqa"):
        made[name].add_argument("--beams", type=_positive, default=5)
        made[name].add_argument("--max_length", type=_positive, help="Tokens; default: as trained.")
    for name in ("vqa", "match", "ground"):
        made[name].add_argument("picture", metavar="PICTURE")
    made["vqa"].add_argument("question", metavar="QUESTION")
    made["vqa"].add_argument("--answers", help="JSON list of answers to rank.")
    made["match"].add_argument("texts", nargs="+", metavar="TEXT")
    made["retrieve"].add_argument("query", metavar="TEXT|PICTURE")
    made["retrieve"].add_argument(
        "among", metavar="FOLDER|FILE", help="Pictures, or a text a line."
    )
    for name in ("vqa", "retrieve"):
        made[name].add_argument("--top", type=_positive, default=5, help="How many are shown.")
    made["ground"].add_argument("phrase", metavar="PHRASE")
    made["ground"].add_argument("--out", help="Picture file to draw the box into.")
    return top


def run(argv: Sequence[str]) -> int:
    """Runs a command (without the program's name); returns the exit status.

    Raises:
      PredictionError, BadSample, CheckpointError, ConfigError, SourceError: a mistake of the user.
    """
    given = parser().parse_args(argv)
    with config_errors():
        model = load_model(given.checkpoint, given.command, given.tokenizer)
    return 2 if RUNS[given.command](model, given) else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _pictures(folder: Path) -> list[str]:
    """Everything in a folder and below that is named like a picture."""
    names = Image.registered_extensions()
    found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in names and p.is_file())
    if not found:
        raise PredictionError(f"{folder} holds no pictures.")
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(f"{file} cannot be read as texts, one a line: {error}.") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise PredictionError(f"{file} holds no texts; write one a line.")
    return texts


def _named(paths: Sequence[str], path: str, texts: Sequence[str]) -> list[str]:
    """Lines of a picture, which is named where there are several."""
    return [f"{path}: {text}" for text in texts] if len(paths) > 1 else list(texts)


def _say_matches(
    given: Arguments, matches: Sequence[Match], item: str, other: dict[str, str]
) -> None:
    for found in matches:
        values = {"probability": found.probability, "similarity": found.similarity}
        shown = "  -  " if found.probability is None else f"{found.probability:.3f}"
        _say(
            given,
            {**other, item: found.item} | values,
            [f"{shown}  {found.similarity:+.3f}  {found.item}"],
        )


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
