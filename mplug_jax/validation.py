"""Every check of a config, of single numbers and across fields, before time is spent on a run."""

from __future__ import annotations

import functools
import inspect
import math

from ml_collections import ConfigDict

from mplug_jax.config import ConfigError, caption_eval, retrieval_eval

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
