"""The training step of a config on a mesh, as shapes alone: no data, no memory for parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mplug_jax.config import config_errors
from mplug_jax.models.config import ModelConfig
from mplug_jax.tasks import build_task
from mplug_jax.train import jitted_step, make_program, make_update
from mplug_jax.training.sharding import abstract_batch, check_batch, on_mesh
from mplug_jax.training.state import TrainState
from mplug_jax.validation import validate

# Of BERT, where neither the model nor the tokenizer's settings name a size.
BERT_VOCABULARY = 30_522
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_UNUSED = 994  # the [unused] tokens of BERT's vocabulary


class Program(NamedTuple):
    """A step that has not been compiled.

    Attributes:
      jitted: the step as training jits it.
      step: (state, batch) -> (state, metrics).
      step_without_remat: the same, of a model that keeps its activations.
      state: shapes and placement of the train state.
      batch: shapes and placement of a global batch.
      mesh: of real or fake devices.
      model_config: shapes of the model.
      assumptions: what the data would have said, in words.
    """

    jitted: Any
    step: Any
    step_without_remat: Any
    state: TrainState
    batch: Mapping[str, Any]
    mesh: Mesh
    model_config: ModelConfig
    assumptions: tuple[str, ...]


def build_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The step that training would compile for the config on the mesh.

    No file is read: the picture is black, and the vocabulary made up, of the size that
    ``config.model.text.vocab_size`` names, else ``config.data.tokenizer.vocab_size``, else BERT's.

    Raises:
      ConfigError, MeshError: a setting that cannot work; a batch or a parameter that the mesh does
        not divide.
    """
    validate(config)
    check_batch(config.batch_size, mesh, config.accumulate)
    assumptions: list[str] = []
    with tempfile.TemporaryDirectory() as folder, config_errors():
        task = build_task(_without_data(config, Path(folder), assumptions), folder)
        example = _example(task, config, assumptions)
    made = make_program(config, task, mesh)
    return Program(
        jitted_step(config, task, mesh, made),
        make_update(config, made, task.loss),
        make_update(config, made, task.without_remat().loss),
        made.abstract,
        abstract_batch(example, config.batch_size, mesh),
        mesh,
        task.model_config,
        tuple(assumptions),
    )


def lower(program: Program) -> Any:
    """The step lowered as training lowers it: state donated, everything placed."""
    with on_mesh(program.mesh):
        return program.jitted.lower(program.state, program.batch)


def trace(program: Program, *, remat: bool = True) -> Any:
    """The jaxpr of the step."""
    with on_mesh(program.mesh):
        step = program.step if remat else program.step_without_remat
        return jax.make_jaxpr(step)(program.state, program.batch).jaxpr


def _without_data(config: ConfigDict, folder: Path, assumptions: list[str]) -> ConfigDict:
    """The config with a vocabulary of single letters and fillers in place of files."""
    named = config.model.text.vocab_size or config.data.tokenizer.vocab_size
    size = named or BERT_VOCABULARY
    if not config.model.text.vocab_size:
        why = "config.data.tokenizer.vocab_size" if named else "BERT's; the config names none"
        assumptions.append(f"a vocabulary of {size:,} tokens ({why})")
    tokens = [*_SPECIAL, "a", *(f"[unused{i}]" for i in range(_UNUSED))][:size]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokens))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = None
        config.data.train, config.data.root = (), None
        config.data.cached_variants = 0
        config.data.tokenizer = {"kind": "wordpiece", "path": str(path), "texts": ()}
        config.finetune.caption.prompt = " ".join("a" * len(config.finetune.caption.prompt.split()))
    return config


def _example(task: Any, config: ConfigDict, assumptions: list[str]) -> Mapping[str, Any]:
    """One row of a batch, made by the task itself of a black picture and the word 'a'."""
    model = task.model_config
    size = max(model.vision.image_size)
    picture = np.zeros((size, size, 3), np.uint8)
    record: dict[str, Any] = {
        "id": "black",
        "image": picture,
        "image_id": 0,
        "captions": ["a"],
        "questions": [{"question": "a", "answers": {"a": 1.0}}],
        "phrases": [{"phrase": "a", "box": [0.0, 0.0, 1.0, 1.0]}],
        "pair": {"image2": picture, "sentence": "a", "label": True},
        "entailment": {"hypothesis": "a", "label": "neutral"},
    }
    if model.frames > 1:
        record["video"] = picture[None]
    if config.data.cached_variants:
        tokens = 1 + model.vision.grid[0] * model.vision.grid[1]
        record["features"] = np.zeros((1, tokens, model.vision.width), np.float16)
    example = task.make_example(record, np.random.default_rng(0))
    row = {**example, "valid": np.True_, "bad": np.int32(0)}
    if config.task == "scst":
        row |= _written_texts(config)
        assumptions.append("the update alone: the search for texts before it is not forecast")
    return row


def _written_texts(config: ConfigDict) -> dict[str, Any]:
    """What SCST's search adds to a row; see ``tasks.scst.Rollout.shapes``."""
    scst = config.finetune.scst
    length = 1 + len(config.finetune.caption.prompt.split()) + scst.max_length
    added = {
        "text_ids": np.zeros((scst.texts, length), np.int32),
        "text_mask": np.zeros((scst.texts, length), bool),
        "rewards": np.zeros(scst.texts, np.float32),
    }
    return added | ({"greedy_reward": np.float32(0.0)} if scst.baseline == "greedy" else {})
