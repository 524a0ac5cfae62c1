"""What the entry files share: flags, one line for a person who made a mistake, exit codes."""

from __future__ import annotations

import ast
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from cwcl_jax.config import ConfigError, ExperimentConfig, from_config_dict

# Entry files name the exit codes by this module.
from cwcl_jax.exit_codes import (  # noqa: F401
    BAD_CONFIG,
    DONE,
    FAILED,
    MISTAKES,
    PREEMPTED,
    WATCHDOG,
    exit_code,
)


def define_config_flag() -> flags.FlagHolder:
    """`--config=FILE[:ARGUMENT]` and `--config.a.b=value`."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file with an optional argument, for example configs/lit_cwcl.py:loss=contrastive; "
        "every field can be overridden, for example --config.optimizer.learning_rate=3e-4.",
    )


# Settings of encoders that the command line gives: tower, name or "" for several, text.
_OVERRIDES: list[tuple[str, str, str]] = []
_OVERRIDE = re.compile(r"--?config\.towers\.([\w-]+)\.overrides(?:\.(\w+))?(=.*)?", re.DOTALL)


def _take_overrides(argv: Sequence[str]) -> list[str]:
    """The arguments without settings of encoders, which are kept for `resolve_config`.

    The flags' library knows neither the names of such settings nor how to add to them.
    """
    _OVERRIDES.clear()
    rest, waiting = [], iter(argv)
    for argument in waiting:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            rest.append(argument)
            continue
        text = match[3][1:] if match[3] else next(waiting, "")
        _OVERRIDES.append((match[1], match[2] or "", text))
    return rest


def with_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config with the encoders' settings of the command line beside its own.

    Raises:
      ConfigError: there is no such tower, or several settings are no dict.
    """
    config = dict(config)
    for tower, name, text in _OVERRIDES:
        option = f"--config.towers.{tower}.overrides"
        towers = config.get("towers", {})
        if tower not in towers:
            raise ConfigError(f"{option}: the towers are {', '.join(towers)}")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
        if not name and not isinstance(value, dict):
            raise ConfigError(
                f'{option}={text}: settings by name are wanted, as {option}.NAME=VALUE or "'
                "{'NAME': VALUE}\""
            )
        own = dict(towers[tower].get("overrides") or {})
        changed = own | ({name: value} if name else value)
        config["towers"] = {**towers, tower: {**towers[tower], "overrides": changed}}
    return config


def resolve_config(flag: flags.FlagHolder) -> ExperimentConfig:
    """The frozen experiment that the flags name.

    Raises:
      ConfigError: no config file was given, it does not exist, or its fields are wrong.
    """
    if not flags.FLAGS["config"].present:
        raise ConfigError("--config is missing; try --config=configs/lit_cwcl.py")
    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    _check_is_file(path)
    try:
        is_config = hasattr(flag.value, "to_dict")
    except OSError as error:  # met in the file, and kept until someone looks at the config
        raise ConfigError(f"--config={path}: {error.__cause__ or error}") from error
    if not is_config:
        raise ConfigError(f"--config={path}: get_config() must return a config, got {flag.value!r}")
    _make_importable(Path(path).resolve().parent)
    return from_config_dict(with_overrides(flag.value.to_dict()))


def _make_importable(folder: Path) -> None:
    """Lets a config name modules that lie beside its file, as "module:Class"."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_is_file(path: str) -> None:
    if not Path(path).is_file():
        kind = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise ConfigError(f"--config={path}: {kind}; try --config=configs/lit_cwcl.py")


def whole_numbers(flag: str, values: Sequence[str]) -> list[int]:
    """The entries of a list flag as numbers.

    Raises:
      ConfigError: an entry is none.
    """
    try:
        return [int(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"--{flag}={','.join(values)}: numbers separated by commas") from error


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls `main` and exits with its code.

    A mistake in settings or data, here or in `main`, is one line on stderr and exit code 2.
    """
    try:
        app.run(lambda argv: sys.exit(main(argv) or DONE), flags_parser=_parse_flags)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_CONFIG)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        # The flags' library looks for overrides of a config in sys.argv itself.
        whole, sys.argv = sys.argv, _take_overrides(argv)
        try:
            rest = flags.FLAGS(sys.argv)
        finally:
            sys.argv = whole
    except flags.Error as error:
        # A config file's own error comes as the text of a traceback; its last line says it.
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{lines[-1].split('ConfigError: ')[-1]}; see --help") from error
    except Exception as error:
        message = _config_file_error(argv, error) or _override_error(argv, error)
        if not message:
            raise
        raise ConfigError(message) from error
    if not flags.FLAGS["verbosity"].present:
        # The libraries' INFO lines would bury the run's own; --verbosity=0 shows them.
        logging.set_verbosity(logging.WARNING)
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; options start with --, see --help")
    return rest


def _config_file_error(argv: list[str], error: Exception) -> str:
    """A sentence for an error in the config file, with its line; "" for one of another place."""
    named = (re.match(r"--?config=([^:]*)", argument) for argument in argv)
    path = next((match[1] for match in named if match), "")
    if isinstance(error, OSError):
        _check_is_file(path)
        return f"--config={path}: {error.__cause__ or error}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, error = [error.lineno], SyntaxError(error.msg)
    if lines:
        return f"--config={path}, line {lines[-1]}: {type(error).__name__}: {error}"
    if str(error).endswith("has no attribute 'get_config'"):
        return f"--config={path}: the file defines no function get_config()"
    return ""


def _override_error(argv: list[str], error: Exception) -> str:
    """A sentence for an override of a field that the config does not have; "" for other errors."""
    if not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    if not near:
        options = [a for a in argv if re.match(r"--?(no)?config\.", a)]
        return f"{' '.join(options)}: the config has no such field ({error})"
    option = next((a for a in argv if near[2] in a), f"--config...{near[2]}")
    return f"{option.split('=')[0]}: the config has no field {near[2]!r}; did you mean {near[1]!r}?"
