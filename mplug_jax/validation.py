"""Every check of a config, of single numbers and across fields, before time is spent on a run."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from mplug_jax.config import (
    ConfigError,
    caption_eval,
    classification_eval,
    grounding_eval,
    retrieval_eval,
    vqa_eval,
)
from mplug_jax.data.augmented import checked_transforms
from mplug_jax.data.transforms import DECODERS
from mplug_jax.generation.beam import PROCEDURES
from mplug_jax.objectives.grounding import WEIGHTINGS
from mplug_jax.tasks import TASKS
from mplug_jax.tasks.evaluators.retrieval import SCORES
from mplug_jax.tasks.forward import MEMORIES
from mplug_jax.tasks.scst import BASELINES, SEARCHES

# The values of single numbers, ends included. Larger seeds do not fit the train state's int32.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("total_steps", "batch_size", "accumulate"), (1, math.inf)),
    **dict.fromkeys(("log_every", "eval_every", "checkpoint_every"), (0, math.inf)),
    "seed": (0, 2**31 - 1),
    **{f"objectives.{name}.weight": (0, math.inf) for name in ("itc", "itm", "mlm", "prefix")},
    **{f"objectives.{name}.alpha": (0, 1) for name in ("itc", "mlm", "prefix")},
    **dict.fromkeys(("objectives.mlm.rate", "objectives.prefix.empty_rate"), (0, 1)),
    **dict.fromkeys(
        (
            "objectives.itc.queue_size",
            "objectives.alpha_ramp_steps",
            "objectives.itm.hard_ramp_steps",
            "objectives.itm.pool",
        ),
        (0, math.inf),
    ),
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
    **dict.fromkeys(("max_skipped", "spike_factor"), (0, math.inf)),
    "data.cached_variants": (0, 2),
    **{f"finetune.scst.{name}": (1, math.inf) for name in ("texts", "max_length", "chunks")},
    **dict.fromkeys(("finetune.scst.min_length", "finetune.scst.length_penalty"), (0, math.inf)),
    "finetune.vqa.answers": (1, math.inf),
    "finetune.vqa.alpha": (0, 1),
    "finetune.grounding.bins": (2, math.inf),
    "checkpoint.keep_last": (1, math.inf),
}
EVALUATORS = {
    "retrieval": retrieval_eval,
    "caption": caption_eval,
    "vqa": vqa_eval,
    "grounding": grounding_eval,
    "classification": classification_eval,
}
# The tasks of the four objectives; the others have one loss, set by config.finetune.
PRETRAINING = ("pretrain", "retrieval")
# model.classes and model.classified of the tasks that classify.
CLASSES = {"nlvr2": (2, 2), "snli_ve": (3, 1)}
# Evaluators of what one task alone is trained for.
TASKS_OF = {"grounding": ("grounding",), "classification": tuple(CLASSES)}
# The values of settings that name something.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.decoder": DECODERS,
    "finetune.caption.memory": MEMORIES,
    "finetune.scst.search": SEARCHES,
    "finetune.scst.procedure": PROCEDURES,
    "finetune.scst.baseline": BASELINES,
    "finetune.grounding.weighting": WEIGHTINGS,
}
EVALUATOR_CHOICES: dict[str, tuple[str, ...]] = {
    "score": SCORES,
    "procedure": PROCEDURES,
    "memory": MEMORIES,
    "answers": ("generate", "rank"),
}
EVALUATOR_LOWEST = {
    **dict.fromkeys(("limit", "captions", "min_length"), 0),
    **dict.fromkeys(("rerank", "rank", "beams", "max_length"), 1),
}


def validate(config: ConfigDict) -> None:
    """Raises ConfigError for the first setting that cannot work."""
    _choice("config.task", config.task, TASKS)
    for key, (low, high) in RANGES.items():
        value = _setting(config, key)
        allowed = f"be at least {low}" if high == math.inf else f"lie in [{low}, {high}]"
        _require(low <= value <= high, f"config.{key} must {allowed}, got {value}.")
    for key, choices in CHOICES.items():
        _choice(f"config.{key}", _setting(config, key), choices)
    _require(
        0 <= config.objectives.momentum < 1,
        f"config.objectives.momentum must lie in [0, 1), got {config.objectives.momentum}.",
    )
    if config.task in PRETRAINING:
        _validate_objectives(config.objectives)
        _validate_pool(config)
    else:
        _validate_finetuning(config)
    _validate_model(config)
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
    _validate_transforms(config.data)
    for name, settings in config.evals.items():
        _validate_evaluator(name, settings, config.task, positions)
    for entry in config.published:
        _validate_published(entry, config.evals)
    best, mode = config.checkpoint.best_metric, config.checkpoint.best_mode
    _require(
        not best or best.split("/")[0] in config.evals,
        f"config.checkpoint.best_metric={best!r} is the metric of no evaluator; evaluators are: "
        f"{', '.join(config.evals) or 'none'}.",
    )
    _choice("config.checkpoint.best_mode", mode, ("min", "max"))


def _validate_transforms(data: ConfigDict) -> None:
    """The checks of what training sources say of their own pictures."""
    for number, spec in enumerate(data.train):
        if (given := spec.get("transforms")) is None:
            continue
        try:
            checked_transforms(given)
        except ValueError as error:
            raise ConfigError(f"config.data.train[{number}]: {error}") from error
        _require(
            not data.cached_variants,
            f"config.data.train[{number}] has transforms, but with config.data.cached_variants="
            f"{data.cached_variants} no picture is transformed: leave one of the two out.",
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


def _validate_pool(config: ConfigDict) -> None:
    """The rows that ITM draws negatives from fill a micro-batch, and are more than one."""
    pool, rows = config.objectives.itm.pool, config.batch_size // config.accumulate
    _require(
        not pool or (pool > 1 and rows % min(pool, rows) == 0),
        f"config.objectives.itm.pool={pool} must be 2 or more and divide the {rows} rows of a "
        f"micro-batch (config.batch_size={config.batch_size}, config.accumulate="
        f"{config.accumulate}), or be 0 for all of them.",
    )


def _validate_finetuning(config: ConfigDict) -> None:
    """The checks of the tasks with one loss."""
    finetune, momentum = config.finetune, config.objectives.momentum
    distils = config.task == "vqa" and finetune.vqa.alpha > 0
    hint = ", or give config.finetune.vqa.alpha a value" if config.task == "vqa" else ""
    _require(
        not momentum or distils,
        f"config.objectives.momentum={momentum} keeps a teacher that task {config.task!r} has no "
        f"use for: set objectives.momentum=0{hint}.",
    )
    _require(
        momentum or not distils,
        f"config.finetune.vqa.alpha={finetune.vqa.alpha} needs the momentum model: set "
        "objectives.momentum (0.995), or this to 0.",
    )
    _require(
        finetune.scst.min_length < finetune.scst.max_length,
        f"config.finetune.scst.min_length={finetune.scst.min_length} must be below max_length="
        f"{finetune.scst.max_length}.",
    )
    _require(
        config.task != "grounding"
        or finetune.grounding.appended
        or config.data.tokenizer.kind == "wordpiece",
        "config.finetune.grounding.appended=False takes the [unused] tokens of BERT's vocabulary, "
        f"which a {config.data.tokenizer.kind!r} tokenizer lacks: set it to True.",
    )


def _validate_model(config: ConfigDict) -> None:
    """What the task asks of the model's inputs and of its classifier."""
    task, model = config.task, config.model
    classes, classified = CLASSES.get(task, (0, model.classified))
    _require(
        (model.classes, model.classified) == (classes, classified),
        f"config.model.classes={model.classes}, classified={model.classified} do not fit task "
        f"{task!r}: set classes={classes}" + (f", classified={classified}." if classes else "."),
    )
    stills = [f"task {task!r}"] if task in ("grounding", *CLASSES) else []
    stills += ["config.data.cached_variants"] if config.data.cached_variants else []
    _require(
        task != "nlvr2" or not config.data.cached_variants,
        f"config.data.cached_variants={config.data.cached_variants} keeps one picture a record, "
        "and task 'nlvr2' reads two: set it to 0.",
    )
    _require(
        model.frames == 1 or not stills,
        f"config.model.frames={model.frames} makes the model take clips, which "
        f"{' and '.join(stills)} cannot be used with: set frames=1.",
    )


def _validate_evaluator(name: str, settings: ConfigDict, task: str, positions: int) -> None:
    kind = settings.get("kind")
    _require(
        kind in EVALUATORS,
        f"config.evals.{name}.kind={kind!r}; choose {' or '.join(EVALUATORS)}.",
    )
    fitting = TASKS_OF.get(kind, (task,))
    _require(
        task in fitting,
        f"config.evals.{name}.kind={kind!r} judges what task {' or '.join(fitting)} trains, but "
        f"config.task={task!r}.",
    )
    wanted = {"kind", *inspect.signature(EVALUATORS[kind]).parameters}
    odd = sorted(wanted ^ set(settings.keys()))
    _require(
        not odd,
        f"config.evals.{name} needs exactly the settings {', '.join(sorted(wanted))}; see "
        f"{', '.join(odd)}.",
    )
    for key, low in EVALUATOR_LOWEST.items():
        value = settings.get(key, low)
        _require(value >= low, f"config.evals.{name}.{key} must be at least {low}, got {value}.")
    for key, choices in EVALUATOR_CHOICES.items():
        if key in settings:
            _choice(f"config.evals.{name}.{key}", settings[key], choices)
    length, shortest = settings.get("max_length", 1), settings.get("min_length", 0)
    _require(
        shortest < length,
        f"config.evals.{name}.min_length={shortest} must be below max_length={length}.",
    )
    _require(
        not settings.get("answer_list") or settings.answers == "rank",
        f"config.evals.{name}.answer_list is read with answers='rank' alone; set that, or "
        "answer_list=''.",
    )
    _require(
        length <= positions,
        f"config.evals.{name}.max_length={length} exceeds the {positions} positions of "
        "config.model.text.max_positions.",
    )


def _validate_published(entry: Any, evals: ConfigDict) -> None:
    fits = isinstance(entry, tuple) and [type(part) for part in entry] in ([str, float], [str, int])
    _require(
        fits and entry[0].split("/")[0] in evals,
        f"config.published has {entry!r}, which is no pair of a metric and a figure, such as "
        f"('{next(iter(evals), 'test')}/cider', 141.0), of the evaluators "
        f"{', '.join(evals) or 'none'}.",
    )


def _setting(config: ConfigDict, key: str) -> Any:
    return functools.reduce(lambda group, name: group[name], key.split("."), config)


def _choice(name: str, value: str, choices: Iterable[str]) -> None:
    _require(value in choices, f"{name}={value!r} is unknown; choose {', '.join(choices)}.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
