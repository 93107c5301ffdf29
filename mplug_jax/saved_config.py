"""The config of an earlier run: ``--config=runs/x/config.json`` in place of a Python file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mplug_jax.config import ConfigError, defaults

# Groups whose keys are the experiment's own.
FREE = ("evals",)


def get_config(path: str) -> ConfigDict:
    """The config that a run has written into its workdir, locked.

    Raises:
      ConfigError: it is no JSON object, or holds a setting that does not exist.
      OSError: it cannot be read.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"it is no JSON ({error})") from error
    if not isinstance(settings, Mapping):
        raise ConfigError("it is no JSON object of settings")
    return from_settings(settings)


def from_settings(settings: Mapping[str, Any]) -> ConfigDict:
    """The config of a config.json that has been read; settings newer than it keep their defaults.

    Raises:
      ConfigError: a setting that does not exist, or that has another type.
    """
    config = defaults("base")
    with config.unlocked():
        _fill(config, settings, "")
    return config.lock()


def _fill(group: ConfigDict, settings: Mapping[str, Any], prefix: str) -> None:
    for key, value in settings.items():
        name = prefix + key
        if name in FREE and isinstance(value, Mapping):
            group[key] = ConfigDict(_tuples(value))
        elif key not in group:
            raise ConfigError(
                f"config.{name} does not exist: the config was written by another version"
            )
        elif isinstance(group[key], ConfigDict) and isinstance(value, Mapping):
            _fill(group[key], value, f"{name}.")
        else:
            try:
                group[key] = _tuples(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"config.{name}={value!r} has another type") from error


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
