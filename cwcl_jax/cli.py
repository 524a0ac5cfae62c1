"""Command lines: one way to declare `python -m cwcl_jax.X`, to parse it, and to end it.

    @cli.command(_define, config=True)
    def main(options: Namespace) -> int: ...

makes `main(argv)` a function that returns the exit code. A mistake in the options, the settings or
the data is one line on stderr and exit code 2; an OSError (a full disk, a file that cannot be read)
is one line and exit code 1. With CWCL_TRACEBACK=1 in the environment both are shown with their
traceback. Options are written --with_underscores; --with-hyphens are the same. The end of this file
holds types of options.
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
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from cwcl_jax.config import USUAL_NAMES, ConfigError, ExperimentConfig, from_config_dict

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

_CONFIG_HELP = (
    "config file with an optional argument, for example configs/lit_cwcl.py:loss=contrastive; "
    "every field can be overridden, for example --config.optimizer.learning_rate=3e-4"
)


class Command:
    """A command line: called with arguments it returns the exit code; see the module's text."""

    def __init__(
        self,
        body: Callable[[Namespace], int | None],
        define: Callable[[ArgumentParser], None],
        config: bool,
    ):
        functools.update_wrapper(self, body)
        self._body, self._define, self._config = body, define, config

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The options, and `argv`; `config`, where there is one to take, is None if none is named.

        Raises:
          ConfigError: they cannot be, or the config's file or fields are wrong.
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
        parser.add_argument("--verbosity", type=int, default=-1, help="0: the libraries' lines too")
        options, rest = parser.parse_known_args(argv)
        options.argv = argv
        named = getattr(options, "config", None)
        if self._config and named is not None:
            options.config = _read_config([f"--config={named}", *rest], parser)
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
            if argv is None:  # this process is the command's own
                _set_up_process(options.verbosity)
            return self._body(options) or DONE
        except (*MISTAKES, OSError) as error:
            if os.environ.get("CWCL_TRACEBACK", "0") != "0":
                traceback.print_exception(error)
            # Of settings all that is wrong is told at once, a line for each.
            print("error: " + str(error).replace("\n", "\nerror: "), file=sys.stderr)
            return exit_code(error)
        finally:
            if argv is not None:  # the folder of one command's config is not another's
                sys.path[:] = [folder for folder in sys.path if folder in importable]


def command(
    define: Callable[[ArgumentParser], None], *, config: bool = False
) -> Callable[[Callable[[Namespace], int | None]], Command]:
    """Makes a function of parsed options a command line, whose help is its module's text.

    Args:
      define: adds the options to a parser.
      config: also takes --config=FILE[:ARGUMENT] and --config.a.b=value.
    """
    return lambda body: Command(body, define, config)


def switch(parser: ArgumentParser, name: str, default: bool, about: str) -> None:
    """Adds `--name` and `--noname`; `about` is what the one that is not the default does."""
    on, off = (SUPPRESS, about) if default else (about, SUPPRESS)
    parser.add_argument(f"--{name}", action="store_true", default=default, help=on)
    parser.add_argument(f"--no{name}", action="store_false", dest=name, help=off)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help")


class _Help(RawDescriptionHelpFormatter):
    """The module's text as it stands, and defaults where they say something."""

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
    """The config that a command cannot do without."""
    if config is None:
        raise ConfigError("--config is missing; try --config=configs/lit_cwcl.py")
    return config


def _read_config(argv: list[str], parser: ArgumentParser) -> ExperimentConfig:
    """The frozen experiment that options of the form --config... name; others are errors."""
    # The module of a config file read before, whose names ml_collections would leave in this one's.
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    settings, rest = _settings_of_encoders(argv)
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=["", *rest])
    _parse_flags(values, rest, parser)
    path = config_flags.get_config_filename(values["config"]).split(":")[0]
    _check_is_file(path)
    try:
        value: Any = values["config"].value
        is_config = hasattr(value, "to_dict")
    except OSError as error:  # met in the file, and kept until someone looks at the config
        raise ConfigError(f"--config={path}: {error.__cause__ or error}") from error
    if not is_config:
        raise ConfigError(f"--config={path}: get_config() must return a config, got {value!r}")
    _make_importable(Path(path).resolve().parent)
    return from_config_dict(with_settings(value.to_dict(), settings))


# A setting of an encoder that the command line gives: tower, name or "" for several, text.
_Setting = tuple[str, str, str]
_SETTING = re.compile(r"--?config\.towers\.([\w-]+)\.overrides(?:\.(\w+))?(=.*)?", re.DOTALL)


def _settings_of_encoders(argv: Sequence[str]) -> tuple[list[_Setting], list[str]]:
    """The settings of encoders among the arguments, and the other arguments.

    The flags' library knows neither the names of such settings nor how to add to them.
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
    """A plain config with the encoders' settings of the command line beside its own.

    Raises:
      ConfigError: there is no such tower, or several settings are no dict.
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
                f'{option}={text}: settings by name are wanted, as {option}.NAME=VALUE or "'
                "{'NAME': VALUE}\""
            )
        own = dict(towers[tower].get("overrides") or {})
        changed = own | ({name: value} if name else value)
        config["towers"] = {**towers, tower: {**towers[tower], "overrides": changed}}
    return config


def _make_importable(folder: Path) -> None:
    """Lets a config name modules that lie beside its file, as "module:Class"."""
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
        # A config file's own error comes as the text of a traceback; its last line says it.
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
        name = str(error).strip("'\"")
        if usual := USUAL_NAMES.get(name):
            option = next((a.split("=")[0] for a in options if a.split("=")[0].endswith(name)), "")
            return f"{option}: the config has no field {name!r}; did you mean {usual!r}?"
        return f"{' '.join(options)}: the config has no such field ({error})"
    option = next((a for a in argv if near[2] in a), f"--config...{near[2]}")
    return f"{option.split('=')[0]}: the config has no field {near[2]!r}; did you mean {near[1]!r}?"


def names(known: Sequence[str], separator: str = ",") -> Callable[[str], list[str]]:
    """Some of the known names."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(separator)]
        for name in chosen:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is none of {f'{separator} '.join(known)}")
        return chosen

    return parse


def sizes(text: str) -> list[tuple[int, int]]:
    """Rows and widths, "256x64,1024x512"."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) for size in text.split(",")]
    pairs = [(int(size[1]), int(size[2])) for size in found if size]
    if len(pairs) < len(found):
        raise ArgumentTypeError(f"{text!r} is not N x d, such as 256x64,1024x512")
    return pairs


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on, "1,2,4"."""
    found = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", number) for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 on, such as 1,2,4")
    return [int(number) for number in found]


def step(text: str) -> int | str:
    """A type of options: a checkpoint's number, or "best"."""
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no step: a number, or 'best'") from None


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def folder(text: str) -> Path:
    """A folder that is there or can be made."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ArgumentTypeError(f"{part} is a file; name a folder")
    return path


def positives(text: str) -> list[float]:
    """Numbers above 0, "14.3,100"."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(number > 0 for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 14.3,100")
    return found


def words(text: str) -> list[str]:
    """Anything, separated by commas."""
    return [word for word in text.split(",") if word]
