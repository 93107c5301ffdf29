"""Weights of other projects to a checkpoint, and back: ``python -m mplug_jax.convert``.

  mplug FILE --out=DIR            an official mPLUG checkpoint
  towers --vision=FILE --text=FILE --config=CONFIG --out=DIR
                                  CLIP or DINOv2 into the image encoder, BERT into the rest
  export CHECKPOINT --out=FILE    to official names, .safetensors or .pth
  inspect FILE                    what a file is

DIR then serves as ``--config.init_from`` of a run; what became of every tensor is in
``DIR/conversion.txt``. See docs/checkpoints.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mplug_jax import command_line
from mplug_jax import config as config_lib
from mplug_jax.conversion import official
from mplug_jax.conversion.alignment import account, align_towers
from mplug_jax.conversion.bert import WORDS, fill_text_towers
from mplug_jax.conversion.inference import check_sizes
from mplug_jax.conversion.inspection import describe
from mplug_jax.conversion.official_sizes import read_sizes
from mplug_jax.conversion.reading import read_weights
from mplug_jax.conversion.report import ConversionError, Report
from mplug_jax.conversion.transfer import Filling, Tensors
from mplug_jax.conversion.vision import fill_image_encoder
from mplug_jax.conversion.writing import write_weights
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import count_params
from mplug_jax.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_params,
    save_params,
    saved_config,
)

REPORT = "conversion.txt"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``_flags`` for the meaning of each."""

    out: str
    config: ConfigDict | None = None
    vision: str | None = None
    text: str | None = None
    align: int | None = None
    fusion_stride: int | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    rename: Sequence[str] = ()
    expect_unused: Sequence[str] = ()
    expect_missing: Sequence[str] = ()


def _flags(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file; single values as --config.seed=1.",
        values,
        lock_config=True,
        sys_argv=list(argv),
    )
    for name, text in (
        ("out", "Folder of the new checkpoint; for export, the file."),
        ("vision", "towers: a CLIP or DINOv2 file."),
        ("text", "towers: a BERT file."),
    ):
        flags.DEFINE_string(name, None, text, values)
    for name, text in (
        ("align", "towers: start fusion from so many pairs of the training data."),
        ("fusion_stride", "mplug: default that of the released model of the same ViT width."),
        ("vision_heads", "mplug: default as many as are 64 wide."),
        ("text_heads", "mplug: default as many as are 64 wide."),
    ):
        flags.DEFINE_integer(name, None, text, flag_values=values)
    for name, text in (
        ("rename", "mplug: old=new, beginnings of tensor names."),
        ("expect_unused", "Pattern of tensors that may be left over."),
        ("expect_missing", "Pattern of parameters that may stay at init."),
    ):
        flags.DEFINE_multi_string(name, [], f"{text} May be given several times.", values)
    return values


def convert_mplug(path: str, options: Options) -> str:
    """Writes the checkpoint of an official file, and returns a summary.

    Raises:
      ConversionError, CheckpointError: the file, or what it lacks or holds too much.
    """
    weights = read_weights(path)
    tensors = official.rename(weights.tensors, dict(map(_pair, options.rename)))
    plain, _ = official.fine_tuning_names(tensors)
    given = {
        "fusion.stride": options.fusion_stride,
        "vision.heads": options.vision_heads,
        "text.heads": options.text_heads,
    }
    like = _model(options.config, plain) if options.config else None
    sizes = read_sizes(plain, like, {k: v for k, v in given.items() if v is not None})
    if like:
        check_sizes(sizes.shown, like)
    model = like or sizes.config
    seed = options.config.seed if options.config else 0
    params, report = official.import_params(tensors, model, seed=seed)
    report.notes[:0] = [f"{path}: official mPLUG", *weights.notes, *sizes.notes]
    return _write(params, report, model, options)


def convert_towers(options: Options) -> str:
    """Writes a checkpoint with the parts that ``vision`` and ``text`` fill; returns a summary.

    Raises:
      ConversionError, CheckpointError: a file, or what it lacks or holds too much.
    """
    given = {
        label: (path, fill)
        for label, path, fill in (
            ("vision", options.vision, fill_image_encoder),
            ("text", options.text, fill_text_towers),
        )
        if path
    }
    if options.config is None or not given:
        raise ConversionError("Give --config, and --vision=FILE or --text=FILE or both.")
    if options.align and len(given) < 2:
        raise ConversionError("--align needs both towers: give --vision=FILE and --text=FILE.")
    files = {label: read_weights(path) for label, (path, _) in given.items()}
    model = _model(options.config, files["text"].tensors if "text" in files else {})
    filling, report = Filling(model), Report()
    for label, (path, fill) in given.items():
        part = fill(filling, files[label].tensors)
        part.notes[:0] = [f"{label}: {path}", *files[label].notes]
        report.merge(part, label)
    filling.settle(report, "no file given holds it")
    params = filling.complete(options.config.seed)
    if options.align:
        report.expect(options.expect_unused, options.expect_missing)
        note = align_towers(params, options.config, model, options.align, options.out)
        account(report, note)
    return _write(params, report, model, options)


def export_checkpoint(path: str, options: Options) -> str:
    """Writes a checkpoint's parameters under official names, and returns a summary.

    Raises:
      ConversionError, CheckpointError: no checkpoint, its config is not known, or the official code
        has no such model.
    """
    params, folder = read_params(find_checkpoint(path, "CHECKPOINT"))
    config = options.config or saved_config(folder)
    if config is None:
        raise ConversionError(f"{folder} has no config.json beside it: give --config.")
    words = params["text_encoder"]["embeddings"]["word"]["embedding"]
    state = official.state_dict(params, _model(ConfigDict(config), {WORDS: words}))
    write_weights(options.out, state)
    return (
        f"{folder} -> {options.out}: {len(state)} tensors in official fine-tuned naming\n"
        "not written: CLIP's text tower, the dead fusion layers, momentum twins and queues, which "
        "the official code loads without (strict=False)"
    )


def _model(config: ConfigDict, tensors: Tensors) -> ModelConfig:
    """The config's model; a vocabulary of size 0 takes the file's."""
    words = [len(array) for name, array in tensors.items() if name.endswith(WORDS)]
    size = config.model.text.vocab_size or max(words, default=0)
    if not size:
        raise ConversionError(
            "config.model.text.vocab_size=0, and no file shows it: give its number of tokens."
        )
    return config_lib.model_config(config, size)


def _write(params: Any, report: Report, model: ModelConfig, options: Options) -> str:
    """The checkpoint, its config.json and the account of it, unless something is unexpected."""
    report.expect(options.expect_unused, options.expect_missing)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(f"--out={options.out} cannot be made: {error.strerror}.") from error
    folder = save_params(options.out, params)
    config = ConfigDict(options.config or config_lib.defaults("base"))
    with config.unlocked():
        config.model = ConfigDict(dataclasses.asdict(model))
    config_lib.save_config(config, options.out)
    account = Path(options.out) / REPORT
    account.write_text(report.describe())
    return f"{report.summary()}\n{folder}: {count_params(params):,} parameters; see {account}"


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise ConversionError(f"--rename={text}: write it as --rename=old=new.")
    return old, new


def run(argv: Sequence[str]) -> str:
    """Runs the command of ``argv`` (the program's name first); returns what to print.

    Raises:
      ConversionError, CheckpointError, ConfigError: a mistake of the user.
    """
    values = _flags(argv)
    try:
        _, *command = values(argv)
        if (config := values.config) is not None:
            config.lock()  # of a file that was not found, raises only when used
    except Exception as error:  # a config file may raise anything
        if "--help" in argv:
            return f"{__doc__}\n{values.get_help()}"
        raise ConversionError(command_line.explanation(argv, error)) from error
    given = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    if command[:1] != ["inspect"] and not given["out"]:
        raise ConversionError("Give --out=<folder>, or for export --out=<file>.")
    options = Options(**given)
    match command:
        case ["mplug", path]:
            return convert_mplug(path, options)
        case ["towers"]:
            return convert_towers(options)
        case ["export", path]:
            return export_checkpoint(path, options)
        case ["inspect", path]:
            return describe(read_weights(path))
    raise ConversionError(
        f"Unknown command {' '.join(command)!r}: give mplug FILE, towers, export CHECKPOINT or "
        "inspect FILE; see --help."
    )


if __name__ == "__main__":
    try:
        print(run(sys.argv))
    except (ConversionError, CheckpointError, config_lib.ConfigError) as failure:
        command_line.exit_with(str(failure))
