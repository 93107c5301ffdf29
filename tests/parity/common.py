"""What the groups of compared values share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.generation.beam import BeamConfig, Hypotheses, beam_search
from tests.parity.cases import SPECIAL, Case

# What the official code fills texts of unequal length with.
NO_TOKEN = {"pad_id": -1}
MOMENTUM = 0.995
# A retrieval case holds gradients for two alphas, and the norms of all of them for this one.
NORMS_OF_RETRIEVAL = "alpha0.4/grad/"
# Official mistake: the teacher's fusion network is in no list of pairs to average.
OFFICIAL_TEACHER_FROZEN = ("^fusion/",)


class Value(NamedTuple):
    """An array of ours, and where it is to be compared (None: everywhere)."""

    array: Any
    where: Any = None


Values = dict[str, Value]


def memory_of_image(case: Case, params: Any, image: Any) -> tuple[Any, Any]:
    embeds = case.apply(params, "encode_image", image)
    return embeds, jnp.ones(embeds.shape[:2], bool)


def memory_of_question(case: Case, params: Any, image: Any) -> tuple[Any, Any]:
    ids, mask = case.text("question" if case.kind == "vqa" else "text")
    embeds = case.apply(params, "encode_image", image)
    fused = case.apply(params, "fuse", embeds, case.apply(params, "encode_text", ids, mask), mask)
    return case.apply(params, "memory", *fused, mask)


def gradients(case: Case, loss: Callable[[Any], Any], prefix: str) -> tuple[Any, Values]:
    """(loss and its aux, the gradients with their global norm) by official names."""
    result, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    named = case.official_names(grads)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in named.values()))
    values = {f"{prefix}{name}": Value(g) for name, g in named.items()}
    if prefix in ("grad/", NORMS_OF_RETRIEVAL):
        values |= {f"norm/{name}": Value(np.linalg.norm(g)) for name, g in named.items()}
    return result, values | {f"{prefix}global_norm": Value(norm)}


def mean(sum_and_count: tuple[Any, Any]) -> Any:
    return sum_and_count[0] / sum_and_count[1]


def search(case: Case, memory: Any, prompt_ids: Any = None) -> Hypotheses:
    s = case.settings
    config = BeamConfig(
        s["beam"], s["max_length"], s["min_length"], length_penalty=0.6, procedure="official"
    )

    def search(params: Any, memory: Any) -> Hypotheses:
        return beam_search(
            case.model, params, *memory, config, prompt_ids=prompt_ids, **SPECIAL | NO_TOKEN
        )

    return jax.jit(search)(case.params, memory)


def found_texts(case: Case, found: Hypotheses, name: str, prompt: Any) -> Values:
    """The golden's ids begin with the prompt and are as long as the longest text."""
    rows, length = case.outputs[f"{name}/ids"].shape[1:]
    ids = np.asarray(found.ids)[:, :rows]
    head = np.broadcast_to(np.asarray(prompt, ids.dtype), (*ids.shape[:2], len(prompt)))
    ids = np.concatenate([head, ids], axis=-1)
    assert (ids[..., length:] == NO_TOKEN["pad_id"]).all(), "a text is longer than the official one"
    return {
        f"{name}/ids": Value(ids[..., :length]),
        f"{name}/scores": Value(found.scores[:, :rows]),
    }


def teacher_values(case: Case, teacher: Any, prefix: str) -> Values:
    """Momentum parameters by official name, with the sums that the case's settings hold."""
    named = case.official_names(teacher)
    values, sums = {}, case.settings.get("momentum_sums_after") or {}
    for name, value in named.items():
        part, _, rest = name.partition(".")
        values[f"{prefix}{part}_m.{rest}"] = Value(value)
        if f"{part}_m.{rest}" in sums:
            values[f"sum/{part}_m.{rest}"] = Value(np.sum(value, dtype=np.float64))
    return values
