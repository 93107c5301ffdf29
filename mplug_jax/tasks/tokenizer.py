"""The tokenizer of a run: a file that the config names, or one that the workdir keeps.

Beside a tokenizer that a run has made in its workdir lies what it was made of. As long as there is
no checkpoint, a run that would make another one does so; after that, the parameters need it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mplug_jax.config import ConfigError
from mplug_jax.data.files import joined, write_whole
from mplug_jax.data.records import Source
from mplug_jax.data.sources import build_source
from mplug_jax.data.tokenizers import (
    SENTENCEPIECE_FILE,
    Tokenizer,
    build_tokenizer,
    source_texts,
)
from mplug_jax.training.checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

ORIGIN_FILE = "tokenizer_origin.json"
# Texts that tell one training set from another.
COMPARED = 200


def make_tokenizer(
    config: ConfigDict, workdir: str, sources: list[tuple[Source, float]]
) -> Tokenizer:
    """The tokenizer of ``config.data.tokenizer``.

    Without a path it is the workdir's ``tokenizer.model``: a copy of the one of the run that
    ``config.init_from`` names, or trained on the texts of the first source.

    Args:
      sources: the training sources; without any the tokenizer must exist.

    Raises:
      ConfigError: a file that no run has made lies in its place, and is not what is needed.
      SourceError, CheckpointError: a file that is missing or unreadable; no texts.
    """
    settings = {k: v for k, v in config.data.tokenizer.items() if v and k != "texts"}
    if "path" in settings:
        settings["path"] = str(joined(settings["path"], config.data.root))
        return build_tokenizer(settings, workdir)
    own = Path(workdir) / SENTENCEPIECE_FILE
    needed = own.exists() and _has_checkpoints(own.parent)
    if needed or not sources or settings.get("kind") != "sentencepiece":
        return build_tokenizer(settings, workdir)
    theirs = _theirs(config)
    texts = None if theirs else _texts(config, sources)
    origin = _copied(theirs) if theirs else _trained(settings.get("vocab_size"), texts)
    made = _made_of(own)
    if own.exists() and made is None:
        return _found(own, settings, origin)
    if made == origin:
        return build_tokenizer(settings, workdir)
    if made is not None:
        logger.warning("%s was made for other settings or texts, and is made anew", own)
    if theirs:
        write_whole(own, lambda unfinished: shutil.copyfile(theirs, unfinished))
    tokenizer = build_tokenizer(settings, workdir, texts, anew=not theirs)
    content = json.dumps({"sha256": _digest(own), "origin": origin}, indent=1) + "\n"
    write_whole(own.with_name(ORIGIN_FILE), lambda path: Path(path).write_text(content))
    return tokenizer


def _texts(config: ConfigDict, sources: list[tuple[Source, float]]) -> Source:
    """What a tokenizer is trained on if one must be."""
    texts, data = config.data.tokenizer.texts, config.data
    if not texts:
        return sources[0][0]
    return build_source(texts[0], data.root, config.seed, data.max_bad_fraction)


def _has_checkpoints(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _theirs(config: ConfigDict) -> Path | None:
    """The tokenizer of the run that this one starts from.

    A vocabulary trained anew would not be the one that the parameters were trained with.
    """
    if not config.init_from:
        return None
    theirs = find_checkpoint(config.init_from).parent.parent / SENTENCEPIECE_FILE
    return theirs if theirs.exists() else None


def _copied(theirs: Path) -> dict[str, Any]:
    return {"copy_of": _digest(theirs)}


def _trained(vocab_size: Any, texts: Source) -> dict[str, Any]:
    """By content: the same data may lie elsewhere the next time."""
    sample = json.dumps(list(source_texts(texts, COMPARED))).encode()
    digest = hashlib.sha256(sample).hexdigest()
    return {"vocab_size": vocab_size, "records": len(texts), "texts": digest}


def _made_of(own: Path) -> dict[str, Any] | None:
    """What a run has made the file of; None for a file that none has made, or without one."""
    try:
        written = json.loads(own.with_name(ORIGIN_FILE).read_text())
        return written["origin"] if written["sha256"] == _digest(own) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _found(own: Path, settings: dict[str, Any], origin: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file that somebody has put into the workdir."""
    if "copy_of" in origin and origin["copy_of"] != _digest(own):
        raise ConfigError(
            f"{own} is not the tokenizer that the parameters of config.init_from were trained "
            "with: remove it, or name it in config.data.tokenizer.path if it is meant."
        )
    tokenizer = build_tokenizer(settings, own.parent)
    if tokenizer.vocab_size > settings["vocab_size"] and "copy_of" not in origin:
        raise ConfigError(
            f"{own} has {tokenizer.vocab_size} tokens, more than config.data.tokenizer.vocab_size="
            f"{settings['vocab_size']}: remove it, and one is trained, or name it in "
            "config.data.tokenizer.path if it is meant."
        )
    logger.warning("%s is used as it is: nothing says what it was trained on", own)
    return tokenizer


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
