"""Configuration: defaults, command-line parsing, and every check that spans fields.

A config file is a short Python file with ``get_config(arg) -> ConfigDict`` that starts from
``defaults(...)`` and changes what its experiment is about. The result is locked: a key that does
not exist here is an error that names the nearest one that does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_dict, config_flags

from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    preset,
)


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, why, and what would."""


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """What data and models refuse while they are built from a config is a mistake in it."""
    try:
        yield
    except ValueError as error:
        if type(error) is ValueError:
            raise ConfigError(str(error)) from error
        raise


def defaults(model: str) -> ConfigDict:
    """All settings with the values of the paper's pre-training, for a model preset.

    ``docs/architecture.md`` explains each group; comments here give units.
    """
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.total_steps = 100_000  # updates
    config.batch_size = 1024  # pairs of an update, over all devices
    config.accumulate = 1  # micro-batches of an update
    config.log_every = 100  # steps, as all *_every; 0: never
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.init_from = config_dict.placeholder(str)  # a workdir or checkpoint to start from
    config.mesh = ConfigDict({"data": -1})
    config.model = ConfigDict(dataclasses.asdict(preset(model)))
    config.objectives = ConfigDict(
        {
            "momentum": 0.995,  # EMA decay of the teacher; 0: no teacher
            "momentum_warmup": False,  # min(decay, (1 + step) / (10 + step)), for short runs
            "teacher_frozen": (),  # patterns of what it keeps; official, by mistake: ("^fusion/",)
            "alpha_ramp_steps": 1_000,  # over which every alpha rises from 0
            "official_sequence_softmax": False,  # their distillation's axis: see distillation.py
            "itc": {"weight": 1.0, "alpha": 0.4, "queue_size": 65536},
            # fraction: of the batch's pairs, evenly spaced
            "itm": {"weight": 1.0, "fraction": 1.0},
            "mlm": {"weight": 1.0, "fraction": 1.0, "alpha": 0.4, "rate": 0.15},
            "prefix": {"weight": 1.0, "fraction": 1.0, "alpha": 0.4, "empty_rate": 0.0},
        }
    )
    config.optimizer = ConfigDict(
        {
            "lr": 1e-4,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.02,
            "clip_norm": 1.0,  # 0: no clipping
            "warmup_steps": 2_000,
            "warmup_lr": 1e-6,
            "min_lr": 1e-6,
            "schedule": "cosine",  # or constant, official
            "official": {  # schedule 'official' alone: a staircase by epochs
                "epochs": 0,
                "warmup_units": 0,  # of 100 iterations of the first epoch
                "steps_per_epoch": 0,  # 0: total_steps / epochs
                "iterations_per_step": 1,  # official batches of an update
            },
            "rules": (NO_DECAY,),
        }
    )
    config.data = ConfigDict(
        {
            "root": config_dict.placeholder(str),
            "train": (),
            "tokenizer": {"kind": "wordpiece", "path": "vocab.txt", "vocab_size": 0},
            "text_length": 30,  # tokens, with [CLS] and [SEP]
            "target_length": 30,
            "crop_scale": (0.2, 1.0),
            "flip": True,
            "randaugment": True,
            "cached_variants": 0,  # of a frozen encoder's output: 1: as it is, 2: and mirrored
            "workers": 0,  # processes that make batches; 0: threads
            "threads": 2,
            "max_bad_fraction": 0.01,
        }
    )
    config.evals = ConfigDict()
    config.checkpoint = ConfigDict({"keep_last": 2, "best_metric": "", "best_mode": "max"})
    return config.lock()


# Biases, LayerNorms and single vectors are not decayed (the official list misses CLIP's norms).
NO_DECAY = (
    r"(bias|scale|class_embedding|position_embedding|temperature)$",
    {"weight_decay": 0.0},
)
# The official list, ["bias", "LayerNorm.weight"]: the norms of the ViT and the bridge do decay.
OFFICIAL_NO_DECAY = (r"(bias|(?<!bridge/)layer_norm/scale)$", {"weight_decay": 0.0})


def retrieval_eval(
    source: Mapping[str, Any], *, limit: int, rerank: int, captions: int = 1
) -> dict[str, Any]:
    """Settings of a retrieval evaluator: ITC ranking, then ITM over the ``rerank`` best.

    ``captions``: texts of a picture, its first ones; 0 takes all.
    """
    settings = {"limit": limit, "rerank": rerank, "captions": captions}
    return {"kind": "retrieval", "source": dict(source), **settings}


def caption_eval(source: Mapping[str, Any], *, limit: int, max_length: int) -> dict[str, Any]:
    """Settings of a captioning evaluator: greedy captions of at most ``max_length`` tokens."""
    return {"kind": "caption", "source": dict(source), "limit": limit, "max_length": max_length}


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model of a config; ``model.text.vocab_size`` 0 takes the tokenizer's.

    Raises:
      ConfigError: the tokenizer has more tokens than the model.
    """
    settings = config.model.to_dict()
    parts = {
        "vision": VisionConfig,
        "text": TextConfig,
        "fusion": FusionConfig,
        "decoder": DecoderConfig,
    }
    wanted = settings["text"]["vocab_size"]
    if wanted and wanted < vocab_size:
        raise ConfigError(
            f"config.model.text.vocab_size={wanted}, but the tokenizer has {vocab_size} tokens. "
            "Set it to 0 to take the tokenizer's."
        )
    settings["text"]["vocab_size"] = wanted or vocab_size
    try:
        built = {name: part(**_tuples(settings[name])) for name, part in parts.items()}
        return ModelConfig(**{**_tuples(settings), **built})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


# The values of single numbers, ends included. Larger seeds do not fit the train state's int32.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("total_steps", "batch_size", "accumulate"), (1, math.inf)),
    **dict.fromkeys(("log_every", "eval_every", "checkpoint_every"), (0, math.inf)),
    "seed": (0, 2**31 - 1),
    **{f"objectives.{name}.weight": (0, math.inf) for name in ("itc", "itm", "mlm", "prefix")},
    **{f"objectives.{name}.alpha": (0, 1) for name in ("itc", "mlm", "prefix")},
    **dict.fromkeys(("objectives.mlm.rate", "objectives.prefix.empty_rate"), (0, 1)),
    **dict.fromkeys(("objectives.itc.queue_size", "objectives.alpha_ramp_steps"), (0, math.inf)),
    **{
        f"optimizer.{name}": (0, math.inf)
        for name in ("lr", "weight_decay", "clip_norm", "warmup_steps", "warmup_lr", "min_lr")
    },
    **{f"optimizer.official.{n}": (0, math.inf) for n in ("epochs", "warmup_units")},
    "optimizer.official.steps_per_epoch": (0, math.inf),
    "optimizer.official.iterations_per_step": (1, math.inf),
    **dict.fromkeys(("data.text_length", "data.target_length"), (3, math.inf)),
    **dict.fromkeys(("data.workers", "data.threads"), (0, math.inf)),
    "data.max_bad_fraction": (0, 1),
    "data.cached_variants": (0, 2),
    "checkpoint.keep_last": (1, math.inf),
}
EVALUATORS = {"retrieval": retrieval_eval, "caption": caption_eval}


def validate(config: ConfigDict) -> None:
    """Raises ConfigError for the first setting that cannot work."""
    for key, (low, high) in RANGES.items():
        value = functools.reduce(lambda group, name: group[name], key.split("."), config)
        allowed = f"be at least {low}" if high == math.inf else f"lie in [{low}, {high}]"
        _require(low <= value <= high, f"config.{key} must {allowed}, got {value}.")
    _validate_objectives(config.objectives)
    longest = max(config.data.text_length, config.data.target_length)
    positions = config.model.text.max_positions
    _require(
        longest <= positions,
        f"config.data.text_length/target_length={longest} exceeds the {positions} positions of "
        "config.model.text.max_positions.",
    )
    _require(
        len(config.data.train) > 0,
        "config.data.train names no source; see docs/data.md for the kinds.",
    )
    for name, settings in config.evals.items():
        _validate_evaluator(name, settings, positions)
    best, mode = config.checkpoint.best_metric, config.checkpoint.best_mode
    _require(
        not best or best.split("/")[0] in config.evals,
        f"config.checkpoint.best_metric={best!r} is the metric of no evaluator; evaluators are: "
        f"{', '.join(config.evals) or 'none'}.",
    )
    _require(
        mode in ("min", "max"), f"config.checkpoint.best_mode={mode!r} is unknown; choose min, max."
    )


def _validate_objectives(objectives: ConfigDict) -> None:
    weights = {name: objectives[name].weight for name in ("itc", "itm", "mlm", "prefix")}
    _require(
        max(weights.values()) > 0,
        f"config.objectives: one of the weights must be positive, got {weights}.",
    )
    for name in ("itm", "mlm", "prefix"):
        fraction = objectives[name].fraction
        _require(
            0 < fraction <= 1,
            f"config.objectives.{name}.fraction must lie in (0, 1], got {fraction}.",
        )
    _require(
        0 <= objectives.momentum < 1,
        f"config.objectives.momentum must lie in [0, 1), got {objectives.momentum}.",
    )
    if not objectives.momentum:
        needs = [f"{n}.alpha" for n in ("itc", "mlm", "prefix") if objectives[n].alpha]
        needs += ["itc.queue_size"] if objectives.itc.queue_size else []
        _require(
            not needs,
            f"config.objectives.{needs[0] if needs else ''} needs the momentum model: set "
            "objectives.momentum (0.995), or this to 0.",
        )
    _require(
        not weights["itm"] or weights["itc"],
        "config.objectives.itm draws its negatives from the ITC similarities: give itc a weight.",
    )


def _validate_evaluator(name: str, settings: ConfigDict, positions: int) -> None:
    kind = settings.get("kind")
    _require(
        kind in EVALUATORS,
        f"config.evals.{name}.kind={kind!r}; choose {' or '.join(EVALUATORS)}.",
    )
    wanted = {"kind", *inspect.signature(EVALUATORS[kind]).parameters}
    odd = sorted(wanted ^ set(settings.keys()))
    _require(
        not odd,
        f"config.evals.{name} needs exactly the settings {', '.join(sorted(wanted))}; see "
        f"{', '.join(odd)}.",
    )
    for key, low in (("limit", 1), ("rerank", 1), ("captions", 0), ("max_length", 1)):
        value = settings.get(key, low)
        _require(value >= low, f"config.evals.{name}.{key} must be at least {low}, got {value}.")
    length = settings.get("max_length", 1)
    _require(
        length <= positions,
        f"config.evals.{name}.max_length={length} exceeds the {positions} positions of "
        "config.model.text.max_positions.",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def save_config(config: ConfigDict, workdir: str | Path) -> None:
    """Writes config.json into the workdir."""
    path = Path(workdir) / "config.json"
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def run_main(main: Callable[[ConfigDict, str], None]) -> None:
    """Runs ``main(config, workdir)`` from ``--config`` and ``--workdir``.

    A user's mistake ends with one message and exit status 2, without a traceback.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Config file; single values as --config.total_steps=1000.", lock_config=True
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run: checkpoints, metrics, plots."
    )

    def checked(_: Sequence[str]) -> None:
        if config_flag.value is None or not workdir.value:
            exit_with("Give --config=configs/<file>.py and --workdir=<folder>.")
        try:
            Path(workdir.value).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            exit_with(f"--workdir={workdir.value} cannot be made: {error.strerror}.")
        try:
            main(config_flag.value, workdir.value)
        except (ValueError, FileNotFoundError, FloatingPointError) as error:
            # Run by `python -m`, the module with the command is called __main__.
            if not type(error).__module__.startswith(("mplug_jax.", "__main__")):
                raise
            exit_with(str(error))

    app.run(checked, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """absl's parser, with mistakes told in one message."""
    try:
        rest = flags.FLAGS(argv)[1:]
        if (config := flags.FLAGS["config"].value) is not None:
            config.lock()  # of a file that was not found, raises only when used
    except Exception as error:  # a config file may raise anything
        exit_with(explanation(argv, error))
    if rest:
        exit_with(f"Unexpected argument {rest[0]!r}: settings are given as --config.<key>=<value>.")
    return argv[:1]


def explanation(argv: Sequence[str], error: Exception) -> str:
    """What is wrong with the config file, else with a key, else what the parser said."""
    joined = re.findall(r"(?m)^--?config[=\n](.*)$", "\n".join(argv))
    if joined:
        path, _, arg = joined[0].partition(":")
        try:
            keys = _flat(_load(path, arg).to_dict())
        except Exception as failure:
            return _file_explanation(path, failure)
        for key in re.findall(r"(?m)^--?(?:no)?config\.([^=\n]+)", "\n".join(argv)):
            if key not in keys:
                return f"config.{key} does not exist.{_nearest(key, keys)}"
    return f"{_short(error)} See --help."


def _file_explanation(path: str, failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.filename == path:
        return f"The config file {path} cannot be read: {failure.strerror}."
    lines = [f.lineno for f in traceback.extract_tb(failure.__traceback__) if f.filename == path]
    where = f", line {lines[-1]}" if lines else ""
    return f"The config file {path}{where} failed: {type(failure).__name__}: {_short(failure)}"


def _short(error: BaseException) -> str:
    """An error's text without the dump of the whole config that ml_collections puts into it."""
    inner = error.args[0] if error.args else None
    if isinstance(inner, BaseException):
        return _short(inner)
    if " Other fields present: " in str(error):
        return re.sub(r'(?s) Other fields present: ".*}"', "", inner).replace("\n", " ")
    return str(error)


def _load(path: str, arg: str) -> ConfigDict:
    """Runs a config file by itself, so that what it raises is not wrapped by the parser."""
    namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
    exec(compile(Path(path).read_text(), path, "exec"), namespace)
    if "get_config" not in namespace:
        raise ConfigError("it defines no get_config()")
    return namespace["get_config"](arg) if arg else namespace["get_config"]()


def _nearest(key: str, keys: Sequence[str]) -> str:
    """A hint: the key of the same last name in another group, or the one spelt most alike."""
    namesakes = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
    near = namesakes or difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names.append(prefix + key)
        if isinstance(value, Mapping):
            names += _flat(value, f"{prefix}{key}.")
    return names


def exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
