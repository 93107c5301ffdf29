"""Tasks: how a batch becomes a loss and how a checkpoint is judged, one file a task.

The loop knows a task by its interface alone:

- ``model``: the module; ``init_params(rng)``: its parameters, boxed with logical axes;
- ``init_extra(rng)``: what the task keeps in the train state, or None;
- ``optional_parameters``: patterns of parameters that ``config.init_from`` may lack or not need;
- ``uses_momentum``: whether the train state holds a momentum model;
- ``sources``, ``make_example``: the training data;
- ``rollout(mesh)``: None, or what the loop asks of every batch before its update:
  ``shapes(example)``, an example with all that is added, and ``__call__(params, batch, step)``,
  the batch (host arrays) with it;
- ``without_remat()``: the same task without rematerialisation;
- ``loss(params, momentum_params, extra, batch, rng, step) -> (loss, extra, metrics)``;
- ``evaluators(mesh)``: name -> callable (params, folder for samples or None) -> metrics.
"""

import functools
from collections.abc import Callable
from typing import Any

from mplug_jax.config import ConfigError
from mplug_jax.tasks.caption import CAPTION
from mplug_jax.tasks.classification import CLASSIFICATION
from mplug_jax.tasks.finetune import Finetune
from mplug_jax.tasks.grounding import GROUNDING
from mplug_jax.tasks.pretrain import Pretrain
from mplug_jax.tasks.scst import SCST
from mplug_jax.tasks.vqa import VQA

TASKS: dict[str, Callable[..., Any]] = {
    "pretrain": Pretrain,
    # ITC and ITM alone: config.objectives.{mlm,prefix}.weight = 0.
    "retrieval": Pretrain,
    "caption": functools.partial(Finetune, CAPTION),
    "scst": functools.partial(Finetune, SCST),
    "vqa": functools.partial(Finetune, VQA),
    "grounding": functools.partial(Finetune, GROUNDING),
    "nlvr2": functools.partial(Finetune, CLASSIFICATION),
    "snli_ve": functools.partial(Finetune, CLASSIFICATION),
}


def build_task(config: Any, workdir: str) -> Any:
    """The task that ``config.task`` names.

    Raises:
      ConfigError: an unknown name.
    """
    if config.task not in TASKS:
        raise ConfigError(f"config.task={config.task!r} is unknown; choose {', '.join(TASKS)}.")
    return TASKS[config.task](config, workdir)
