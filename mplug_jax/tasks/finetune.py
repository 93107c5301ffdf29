"""Fine-tuning: the task interface for one loss of the whole model (see ``mplug_jax.tasks``)."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mplug_jax.models.config import ModelConfig
from mplug_jax.models.mplug import init_params
from mplug_jax.tasks.evaluators import build_evaluators
from mplug_jax.tasks.forward import Forward
from mplug_jax.tasks.kind import Kind
from mplug_jax.tasks.setup import prepare

Array = jax.Array


class Finetune:
    """A task of the given kind."""

    optional_parameters = ("^classifier/",)

    def __init__(self, kind: Kind, config: ConfigDict, workdir: str):
        self.kind, self.config, self.setup = kind, config, prepare(config, workdir)
        self.make_example = kind.examples(self.setup)
        self.uses_momentum = kind.teaches and config.objectives.momentum > 0

    @property
    def sources(self) -> Any:
        """(training source, weight) pairs."""
        return self.setup.sources

    @property
    def model_config(self) -> ModelConfig:
        """The model's shapes."""
        return self.setup.model_config

    def without_remat(self) -> Finetune:
        """The same task on a model that keeps its activations, for counting FLOPs."""
        task = copy.copy(self)
        task.setup = self.setup.without_remat()
        return task

    def init_params(self, rng: Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""
        return init_params(self.model_config, rng)

    def init_extra(self, rng: Array) -> None:
        """Nothing is kept between steps."""
        return None

    def rollout(self, mesh: Any) -> Any:
        """What the loop asks for every batch before its update, or None."""
        return self.kind.rollout(self.setup, mesh) if self.kind.rollout else None

    def loss(
        self, params: Any, momentum_params: Any, extra: Any, batch: Any, rng: Array, step: Array
    ) -> tuple[Array, Any, dict[str, Array]]:
        """The kind's loss as a mean over what it counts."""
        model = self.setup.model
        teacher = None if momentum_params is None else Forward(model, momentum_params)
        forward = Forward(model, params, rng)
        loss_sum, count, metrics = self.kind.loss(self.setup, forward, teacher, batch, step)
        return loss_sum / jnp.maximum(count, 1.0), extra, metrics

    def evaluators(self, mesh: Any) -> dict[str, Any]:
        """The evaluators of ``config.evals`` by name."""
        return build_evaluators(self.setup, mesh)
