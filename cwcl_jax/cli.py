"""Command lines: how to declare, parse and end `python -m cwcl_jax.X`.

    @cli.command(_define, config=True)
    def main(options: Namespace) -> int: ...

makes `main(argv)` a function that returns the exit code. An error in the options, the settings or
the data is printed as one line on stderr, with exit code 2; an OSError (a full disk, an unreadable
file) is one line with exit code 1. With CWCL_TRACEBACK=1 in the environment, both are printed with
their traceback. Options are written --with_underscores; --with-hyphens mean the same. The end of
this file holds types of options.
"""

from __future__ import annotations

import ast
import difflib
import faulthandler
import functools
import os
import re
import sys
import traceback
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from absl import flags, logging
from ml_collections import config_flags

from cwcl_jax.config import ConfigError, ExperimentConfig, from_config_dict
from cwcl_jax.conversion import USUAL_NAMES, all_told, refuse

# Entry files refer to the exit codes through this module.
from cwcl_jax.exit_codes import (  # noqa: F401
    BAD_CONFIG,
    DONE,
    FAILED,
    MISTAKES,
    PREEMPTED,
    WATCHDOG,
    exit_code,
)

_CONFIG_HELP = (
    "config file with an optional argument, for example configs/lit_cwcl.py:loss=contrastive; "
    "every field can be overridden, for example --config.optimizer.learning_rate=3e-4"
)


class Command:
    """A command line: called with arguments it returns the exit code (see the module)."""

    def __init__(
        self,
        body: Callable[[Namespace], int | None],
        define: Callable[[ArgumentParser], None],
        config: bool,
    ):
        functools.update_wrapper(self, body)
        self._body, self._define, self._config = body, define, config

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Returns the options, with `argv`; `config` is None if no config is given.

        Raises:
          ConfigError: the options are invalid, or the config's file or fields are wrong.
        """
        argv = [_underscored(argument) for argument in argv]
        module = sys.modules[self._body.__module__]
        name = module.__spec__.name if module.__spec__ else module.__name__
        parser = _Parser(
            prog=f"python -m {name}", description=module.__doc__, allow_abbrev=False,
            formatter_class=_Help,
        )  # fmt: skip
        if self._config:
            parser.add_argument("--config", metavar="FILE[:ARGUMENT]", help=_CONFIG_HELP)
        self._define(parser)
        parser.add_argument(
            "--verbosity", type=int, default=-1, help="0 also shows the libraries' messages"
        )
        options, rest = parser.parse_known_args(argv)
        options.argv = argv
        named = getattr(options, "config", None)
        if self._config and named is not None:
            options.config = _read_config([f"--config={_found(named)}", *rest], parser)
        else:
            overrides = [a for a in rest if self._config and re.match(r"--?(no)?config\.", a)]
            if overrides:
                raise ConfigError(f"{overrides[0]}: --config is missing")
            _parse_flags(flags.FlagValues(), rest, parser)
        return options

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        importable = [*sys.path]
        try:
            options = self.parse(sys.argv[1:] if argv is None else argv)
            if argv is None:  # this process belongs to the command
                _set_up_process(options.verbosity)
            return self._body(options) or DONE
        except (*MISTAKES, OSError) as error:
            if os.environ.get("CWCL_TRACEBACK", "0") != "0":
                traceback.print_exception(error)
            # Of settings all that is wrong is told at once, a line for each.
            print("error: " + str(error).replace("\n", "\nerror: "), file=sys.stderr)
            return exit_code(error)
        finally:
            # the folder of one command's config must not stay importable for another
            if argv is not None:
                sys.path[:] = [folder for folder in sys.path if folder in importable]


def command(
    define: Callable[[ArgumentParser], None], *, config: bool = False
) -> Callable[[Callable[[Namespace], int | None]], Command]:
    """Returns a decorator that makes a function of parsed options a command line.

    The help text is the docstring of the function's module.

    Args:
      define: adds the options to a parser.
      config: also takes --config=FILE[:ARGUMENT] and --config.a.b=value.
    """
    return lambda body: Command(body, define, config)


def switch(parser: ArgumentParser, name: str, default: bool, about: str) -> None:
    """Adds `--name` and `--noname`; `about` describes the one that is not the default."""
    on, off = (SUPPRESS, about) if default else (about, SUPPRESS)
    parser.add_argument(f"--{name}", action="store_true", default=default, help=on)
    parser.add_argument(f"--no{name}", action="store_false", dest=name, help=off)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help")


class _Help(RawDescriptionHelpFormatter):
    """Formats the module's docstring unchanged, and shows defaults that carry information."""

    def _get_help_string(self, action) -> str | None:
        value = action.default
        said = isinstance(value, int | float | str) and not isinstance(value, bool)
        said = said and value not in ("", SUPPRESS)
        return f"{action.help or ''} (default: %(default)s)" if said else action.help


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config"):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _set_up_process(verbosity: int) -> None:
    faulthandler.enable()
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    # The libraries' INFO lines would bury the run's own; --verbosity=0 shows them.
    logging.set_verbosity(verbosity)


def required(config: ExperimentConfig | None) -> ExperimentConfig:
    """Returns the config of a command that needs one; raises ConfigError if it is missing."""
    if config is None:
        raise ConfigError("--config is missing; try --config=configs/lit_cwcl.py")
    return config


def _read_config(argv: list[str], parser: ArgumentParser) -> ExperimentConfig:
    """Returns the frozen experiment of the --config... options; other options are errors."""
    # Removes the module of a previously read config file, whose names would leak into this one.
    sys.modules.pop("config_config", None)
    settings, rest = _settings_of_encoders(argv)
    values, wrong = _values_of(rest, parser)
    path = config_flags.get_config_filename(values["config"]).split(":")[0]
    _check_is_file(path)
    try:
        value: Any = values["config"].value
        is_config = hasattr(value, "to_dict")
    except OSError as error:  # raised in the file, but deferred until the config is accessed
        raise ConfigError(f"--config={path}: {error.__cause__ or error}") from error
    if not is_config:
        raise ConfigError(f"--config={path}: get_config() must return a config, got {value!r}")
    _make_importable(Path(path).resolve().parent)
    _, config = all_told(
        lambda: refuse(wrong),
        lambda: from_config_dict(with_settings(value.to_dict(), settings)),
    )
    return cast(ExperimentConfig, config)


def _values_of(argv: list[str], parser: ArgumentParser) -> tuple[flags.FlagValues, list[str]]:
    """Returns the flags of a config with its valid overrides, and a message for each other one.

    Raises:
      ConfigError: with a line for each mistake, if one of them is not in a single override.
    """
    wrong: list[str] = []
    while True:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=["", *argv])
        try:
            _parse_flags(values, argv, parser)
            return values, wrong
        except ConfigError as error:
            wrong.append(str(error))
            places = [i for i, argument in enumerate(argv) if _is_named(argument, str(error))]
            if len(places) != 1:
                raise ConfigError("\n".join(wrong)) from error
            (place,) = places
            alone = "=" in argv[place] or argv[place + 1 : place + 2] == []
            has_value = not alone and not argv[place + 1].startswith("-")
            argv = argv[:place] + argv[place + 1 + has_value :]


def _is_named(argument: str, message: str) -> bool:
    """Returns whether an argument is an override that a message is about."""
    name = argument.split("=")[0]
    is_override = re.match(r"--?(no)?config\.", name)
    return bool(is_override and re.search(rf"{re.escape(name)}[=:]", message))


def _found(named: str) -> str:
    """Returns FILE[:ARGUMENT], with the package's own file if FILE does not exist.

    The package carries configs/, so that an installed command works in any folder.
    """
    path, colon, argument = named.partition(":")
    shipped = Path(__file__).parent / path
    if path.startswith("configs/") and not Path(path).exists() and shipped.is_file():
        print(f"{path} is not in this folder; using {shipped}", file=sys.stderr)
        return f"{shipped}{colon}{argument}"
    return named


# An encoder setting from the command line: tower, name or "" for several, text.
_Setting = tuple[str, str, str]
_SETTING = re.compile(r"--?config\.towers\.([\w-]+)\.overrides(?:\.(\w+))?(=.*)?", re.DOTALL)


def _settings_of_encoders(argv: Sequence[str]) -> tuple[list[_Setting], list[str]]:
    """Returns the encoder settings among the arguments, and the other arguments.

    The flags library can neither parse the names of such settings nor add to them.
    """
    settings, rest, waiting = [], [], iter(argv)
    for argument in waiting:
        if match := _SETTING.fullmatch(argument):
            text = match[3][1:] if match[3] else next(waiting, "")
            settings.append((match[1], match[2] or "", text))
        else:
            rest.append(argument)
    return settings, rest


def with_settings(config: Mapping[str, Any], settings: Sequence[_Setting]) -> dict[str, Any]:
    """Returns a plain config with the command line's encoder settings added to its own.

    Raises:
      ConfigError: there is no such tower, or several settings are not a dict.
    """
    config = dict(config)
    for tower, name, text in settings:
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
                f'{option}={text}: settings by name are expected, as {option}.NAME=VALUE or "'
                "{'NAME': VALUE}\""
            )
        own = dict(towers[tower].get("overrides") or {})
        changed = own | ({name: value} if name else value)
        config["towers"] = {**towers, tower: {**towers[tower], "overrides": changed}}
    return config


def _make_importable(folder: Path) -> None:
    """Lets a config name modules in the folder of its file, as "module:Class"."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_is_file(path: str) -> None:
    if not Path(path).is_file():
        kind = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise ConfigError(f"--config={path}: {kind}; try --config=configs/lit_cwcl.py")


def _parse_flags(values: flags.FlagValues, argv: list[str], parser: ArgumentParser) -> None:
    try:
        rest = values(["", *argv])
    except flags.UnrecognizedFlagError as error:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(f"--{error.flagname}", known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown option --{error.flagname}{hint}; see --help") from error
    except flags.Error as error:
        # A config file's own error arrives as the text of a traceback; its last line is the
        # message.
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{lines[-1].split('ConfigError: ')[-1]}; see --help") from error
    except Exception as error:
        message = _config_file_error(argv, error) or _override_error(argv, error)
        if not message:
            raise
        raise ConfigError(message) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; options start with --, see --help")


def _config_file_error(argv: list[str], error: Exception) -> str:
    """Returns a message for an error in the config file, with its line; "" for other errors."""
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
    """Returns a message for an override of an unknown field; "" for other errors."""
    if not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    if not near:
        options = [a for a in argv if re.match(r"--?(no)?config\.", a)]
        name = str(error).strip("'\"")
        if usual := USUAL_NAMES.get(name):
            option = next((a.split("=")[0] for a in options if a.split("=")[0].endswith(name)), "")
            return f"{option}: the config has no field {name!r}; did you mean {usual!r}?"
        return f"{' '.join(options)}: the config has no such field ({error})"
    option = next((a for a in argv if near[2] in a), f"--config...{near[2]}")
    return f"{option.split('=')[0]}: the config has no field {near[2]!r}; did you mean {near[1]!r}?"


def names(known: Sequence[str], separator: str = ",") -> Callable[[str], list[str]]:
    """Returns a parser of known names."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(separator)]
        for name in chosen:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is not one of {f'{separator} '.join(known)}")
        return chosen

    return parse


def sizes(text: str) -> list[tuple[int, int]]:
    """Returns rows and widths, from "256x64,1024x512"."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) for size in text.split(",")]
    pairs = [(int(size[1]), int(size[2])) for size in found if size]
    if len(pairs) < len(found):
        raise ArgumentTypeError(f"{text!r} is not N x d, such as 256x64,1024x512")
    return pairs


def counts(text: str) -> list[int]:
    """Returns positive whole numbers, from "1,2,4"."""
    found = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", number) for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 on, such as 1,2,4")
    return [int(number) for number in found]


def step(text: str) -> int | str:
    """Returns a checkpoint's step number, or "best"."""
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a step: give a number, or 'best'") from None


def at_least(least: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers that are at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def file(text: str) -> Path:
    """Returns the path of a file of this machine."""
    if "://" in text:
        raise ArgumentTypeError(f"{text!r} is on an object store; name a file of this machine")
    return Path(text)


def folder(text: str) -> Path:
    """Returns the path of a folder of this machine that exists or can be created."""
    if "://" in text:
        raise ArgumentTypeError(f"{text!r} is on an object store; name a folder of this machine")
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ArgumentTypeError(f"{part} is a file; name a folder")
    return path


def positives(text: str) -> list[float]:
    """Returns positive numbers, from "14.3,100"."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(number > 0 for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 14.3,100")
    return found


def words(text: str) -> list[str]:
    """Returns words, from a comma-separated list."""
    return [word for word in text.split(",") if word]
