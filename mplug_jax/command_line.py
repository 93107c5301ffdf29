"""The flags of train, evaluate and data.inspect; a mistake is told in one message, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mplug_jax import saved_config
from mplug_jax.config import ConfigError
from mplug_jax.training.peers import watched
from mplug_jax.training.processes import connect, membership
from mplug_jax.training.signals import GRACE, Stopped, end_within


def run_main(main: Callable[..., Any]) -> None:
    """Runs ``main(config, workdir, allow_config_change=...)`` from the flags of these names.

    A user's mistake ends with one message and exit status 2, without a traceback.
    """

    allowed = flags.DEFINE_bool(
        "allow_config_change", False, "Continue the run in --workdir though its config differs."
    )
    join = _joining()

    def start(config: ConfigDict, given: Mapping[str, str]) -> None:
        with join():
            main(config, _made(given["workdir"]), allow_config_change=allowed.value)

    _run(
        start,
        {"workdir": "Folder of the run: checkpoints, metrics, plots."},
        required="workdir",
        usage="Give --config=configs/<file>.py and --workdir=<folder>.",
    )


def run_evaluation(
    main: Callable[[ConfigDict, str, str], Any], default_workdir: Callable[[str, str], Path]
) -> None:
    """Runs ``main(config, checkpoint, workdir)`` from the flags of these names.

    Args:
      default_workdir: (checkpoint, name of the config) -> the folder where none is given.

    Mistakes end as in ``run_main``.
    """
    join = _joining()

    def start(config: ConfigDict, given: Mapping[str, str]) -> None:
        name = config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        workdir = given["workdir"] or str(default_workdir(given["checkpoint"], name))
        with join():
            main(config, given["checkpoint"], _made(workdir))

    _run(
        start,
        {
            "checkpoint": "Workdir of a run, one of its checkpoints, or what convert wrote.",
            "workdir": "Folder of the results; default: evaluation/<config>-<step> of the run.",
        },
        required="checkpoint",
        usage="Give --config=configs/<file>.py, or a run's config.json, and "
        "--checkpoint=<workdir or checkpoint>.",
    )


def run_inspection(main: Callable[[ConfigDict, Mapping[str, str]], Any]) -> None:
    """Runs ``main(config, the flags of mplug_jax.data.inspect and the config's name)``.

    Mistakes end as in ``run_main``.
    """

    def start(config: ConfigDict, given: Mapping[str, str]) -> None:
        name = config_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        main(config, {**given, "config": name})

    _run(
        start,
        {
            "out": "HTML file to write, with training samples drawn.",
            "samples": "Records loaded of each source: a number (64), or 'all'.",
            "hash": "Records of each source compared by their pixels: a number (500), 0 or 'all'.",
            "records": "Records read of each source for their texts: a number or 'all'; default: "
            "all, or 2,000 of a source that draws or holds its pictures.",
            "workdir": "A run whose tokenizer.model is used; default: one is trained, if need be.",
        },
        required=None,
        usage="Give --config=configs/<file>.py, or a run's config.json.",
    )


def run_replay(main: Callable[[ConfigDict, str, int], Any]) -> None:
    """Runs ``main(config, workdir, step)`` from the flags of these names.

    Mistakes end as in ``run_main``.
    """

    def start(config: ConfigDict, given: Mapping[str, str]) -> None:
        if not given["step"].isdecimal():
            exit_with(f"--step={given['step']} is no number: give the step that was told.")
        if not Path(given["workdir"]).is_dir():
            exit_with(f"--workdir={given['workdir']} is no folder.")
        main(config, given["workdir"], int(given["step"]))

    _run(
        start,
        {"workdir": "Folder of the run; nothing is written.", "step": "The step, from 1."},
        required="workdir",
        usage="Give --config=<workdir>/config.json, --workdir=<workdir> and --step=<number>.",
    )


def _joining() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Defines the flags of a run of several processes; what is returned joins and watches them."""
    address = {
        "coordinator": "host:port of process 0; or set JAX_COORDINATOR_ADDRESS.",
        "num_processes": "Processes of the run; or JAX_NUM_PROCESSES.",
        "process_id": "Which of them this is, from 0; or JAX_PROCESS_ID.",
    }
    given = {name: flags.DEFINE_string(name, "", text) for name, text in address.items()}
    detect = flags.DEFINE_bool("detect_processes", False, "Let JAX find them, as on a TPU pod.")
    heartbeat = flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds after which a silent process ends the run.", 10
    )
    hang = flags.DEFINE_integer(
        "hang_timeout",
        1800,
        "Seconds without progress of any process after which the one behind ends the run; 0: none.",
        0,
    )

    def join() -> contextlib.AbstractContextManager[None]:
        told = {name: flag.value for name, flag in given.items()}
        joining = membership(told, os.environ, detect=detect.value)
        connect(joining, heartbeat_timeout=heartbeat.value)
        return watched(heartbeat.value, hang.value)

    return join


def _run(
    start: Callable[[ConfigDict, Mapping[str, str]], None],
    texts: Mapping[str, str],
    required: str | None,
    usage: str,
) -> None:
    """Runs ``start(config, values of the flags that texts names)``.

    Without a config, or the flag that is required, ``usage`` is told.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, or the config.json of a run; single values as --config.total_steps=1000.",
        lock_config=True,
    )
    given = {name: flags.DEFINE_string(name, "", text) for name, text in texts.items()}

    def checked(_: Sequence[str]) -> None:
        if config_flag.value is None or (required and not given[required].value):
            exit_with(usage)
        try:
            start(config_flag.value, {name: flag.value for name, flag in given.items()})
        except Stopped as stopped:
            # Python would wait for threads, and one that hangs in a read does not end.
            end_within(GRACE, stopped.code)
            raise
        except (ValueError, FileNotFoundError, FloatingPointError) as error:
            end_with_message(error)

    app.run(checked, flags_parser=_parse_flags)


def end_with_message(error: Exception) -> NoReturn:
    """Ends the program with the message of a mistake that is the user's; raises any other."""
    # Run by `python -m`, the module with the command is called __main__.
    if not type(error).__module__.startswith(("mplug_jax.", "__main__")):
        raise error
    exit_with(str(error))


def _made(workdir: str) -> str:
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with(f"--workdir={workdir} cannot be made: {error.strerror}.")
    return workdir


def config_name(given: str) -> str:
    """A name for what ``--config`` gives: 'quickstart-vqa' for ``configs/quickstart.py:vqa``, and
    'x' for ``runs/x/config.json``."""
    path, _, arg = given.partition(":")
    if path == saved_config.__file__:
        return Path(arg).absolute().parent.name
    return "-".join(filter(None, (Path(path).stem, re.sub(r"[^\w.-]+", "-", arg))))


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """absl's parser, with mistakes told in one message."""
    try:
        rest = flags.FLAGS(reading_saved(argv))[1:]
        if (config := flags.FLAGS["config"].value) is not None:
            config.lock()  # of a file that was not found, raises only when used
    except Exception as error:  # a config file may raise anything
        exit_with(explanation(argv, error))
    if rest:
        exit_with(f"Unexpected argument {rest[0]!r}: settings are given as --config.<key>=<value>.")
    return argv[:1]


def reading_saved(argv: Sequence[str]) -> list[str]:
    """The arguments with each config.json in the form of a Python config file that reads it."""
    names, reader = ("--config", "-config"), f"{saved_config.__file__}:"
    read = []
    for before, argument in zip(("", *argv), argv, strict=False):
        name, _, value = argument.partition("=")
        if argument.endswith(".json") and name in names:
            argument = f"{name}={reader}{value}"
        elif argument.endswith(".json") and before in names:
            argument = reader + argument
        read.append(argument)
    return read


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
    if path.endswith(".json"):
        return saved_config.get_config(path)
    namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
    exec(compile(Path(path).read_text(), path, "exec"), namespace)
    if "get_config" not in namespace:
        raise ConfigError("it defines no get_config()")
    return namespace["get_config"](arg) if arg else namespace["get_config"]()


def _nearest(key: str, keys: Sequence[str]) -> str:
    """A hint: keys of the same last name in other groups, or the one spelt most alike."""
    namesakes = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
    if namesakes:
        near = difflib.get_close_matches(key, namesakes, n=3, cutoff=0.0)
    else:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


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
