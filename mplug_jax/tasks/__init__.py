"""Tasks: how a batch becomes a loss and how a checkpoint is judged, one file a task.

The loop knows a task by its interface alone:

- ``model``: the module; ``init_params(rng)``: its parameters, boxed with logical axes;
- ``init_extra(rng)``: what the task keeps in the train state, or None;
- ``optional_parameters``: patterns of parameters that ``config.init_from`` may lack or not need;
- ``uses_momentum``: whether the train state holds a momentum model;
- ``sources``, ``make_example``: the training data;
- ``without_remat()``: the same task without rematerialisation;
- ``loss(params, momentum_params, extra, batch, rng, step) -> (loss, extra, metrics)``;
- ``evaluators(mesh)``: name -> callable (params, folder for samples or None) -> metrics.
"""

from collections.abc import Callable
from typing import Any

from mplug_jax.config import ConfigError
from mplug_jax.tasks.pretrain import Pretrain

TASKS: dict[str, Callable[..., Any]] = {"pretrain": Pretrain}


def build_task(config: Any, workdir: str) -> Any:
    """The task that ``config.task`` names.

    Raises:
      ConfigError: an unknown name.
    """
    if config.task not in TASKS:
        raise ConfigError(f"config.task={config.task!r} is unknown; choose {', '.join(TASKS)}.")
    return TASKS[config.task](config, workdir)
