"""Strict conversion of plain values into dataclasses of settings, and its errors.

A field may hold one of several dataclasses, including a user's. Its annotation is then a base class
with a classmethod `variant(given: Mapping) -> (class, fields)`, which determines the class from the
given fields, and returns the fields as that class names them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from cwcl_jax.extension import is_missing_code

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


# Other programs' names of a field.
USUAL_NAMES = {
    "lr": "learning_rate", "wd": "weight_decay", "warmup": "warmup_steps",
    "batch_size": "global_batch_size", "steps": "total_steps", "epochs": "total_steps",
}  # fmt: skip


def unknown_field(name: str, known: list[str], where: str) -> str:
    """Returns the message for an unknown field, with the nearest known ones."""
    usual = [USUAL_NAMES[name]] if USUAL_NAMES.get(name) in known else []
    near = list(dict.fromkeys([*usual, *difflib.get_close_matches(name, known, n=3, cutoff=0.0)]))[
        :3
    ]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    others = ", ".join(near[1:])
    return f"{where} has no field {name!r}{hint}" + (f" (or: {others})" if others else "")


def variant_of(cls: type, given: Mapping[str, Any], path: str) -> tuple[type, dict[str, Any]]:
    """Returns the class that the given fields belong to, and the fields under its names."""
    if not hasattr(cls, "variant"):
        return cls, dict(given)
    try:
        return cls.variant(given)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def convert(kind: Any, value: Any, path: str) -> Any:
    """Returns a plain value as an instance of an annotation.

    Args:
      kind: a dataclass of settings, or the annotation of a field of one.
      value: a value from a ConfigDict or JSON.
      path: names it in errors, for example "config.evaluation.tasks.a".

    Raises:
      ConfigError: it does not fit; the message names the path, and the nearest known field.
    """
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) > 1:
            raise ConfigError(_unsupported(kind, path))
        return None if value is None else convert(inner[0], value, path)
    if origin is tuple and arguments[1:] == (...,):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{path} must be a sequence, got {value!r}")
        return tuple(convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if _is_mapping(origin):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, got {value!r}")
        return each(lambda name: convert(arguments[1], value[name], f"{path}.{name}"), value)
    if origin is not None or not (kind is Any or inspect.isclass(kind)):
        raise ConfigError(_unsupported(kind, path))
    return _convert_scalar(kind, value, path)


def _is_mapping(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, Mapping)


def _unsupported(kind: Any, path: str) -> str:
    return (
        f"{path} is annotated {kind}, which settings do not support; use str, int, float, bool, a "
        "dataclass, tuple[T, ...], Mapping[str, T] or T | None"
    )


def _convert_dataclass(cls: type[T], value: Any, path: str) -> T:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must hold the fields of {cls.__name__}, got {value!r}")
    cls, value = variant_of(cls, value, path)
    return made_of(cls, converted(cls, value, path), path)


def converted(cls: type, value: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, each converted to its annotation."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise ConfigError(
            f"{path}: an annotation of {cls.__name__} has no type: {error}"
        ) from error
    known = [field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.init]
    given = [name for name in value if name in known]
    _, made = all_told(
        lambda: require_known(value, known, path),
        lambda: each(lambda name: convert(hints[name], value[name], f"{path}.{name}"), given),
    )
    return made or {}


# Messages about unknown fields, while `with_all_unknown` collects them.
_UNKNOWN: ContextVar[list[str] | None] = ContextVar("cwcl_jax_unknown", default=None)


def with_all_unknown(function: Callable[[], T]) -> T:
    """Returns function(), in which unknown fields do not hide what is wrong with the known ones.

    Raises:
      ConfigError: with a line for each mistake of `function`, and for each unknown field.
    """
    unknown: list[str] = []
    token = _UNKNOWN.set(unknown)
    try:
        return typing.cast(T, all_told(function, lambda: refuse(unknown))[0])
    finally:
        _UNKNOWN.reset(token)


def require_known(names: Iterable[str], known: Sequence[str], path: str) -> None:
    """Raises ConfigError with a line for each name that is not a field (see `with_all_unknown`)."""
    problems = [unknown_field(name, [*known], path) for name in names if name not in known]
    collected = _UNKNOWN.get()
    if collected is not None:
        collected += problems
    else:
        refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Raises ConfigError with a line for each problem, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


def each(function: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """Returns name -> function(name); raises one ConfigError for all names that fail."""
    names = list(names)
    return dict(zip(names, all_told(*(partial(function, n) for n in names)), strict=True))


def made_of(cls: type[T], arguments: Mapping[str, Any], path: str) -> T:
    """Returns `cls(**arguments)`; raises ConfigError if the class refuses them."""
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise ConfigError(f"{path} must be {kind.__name__}, got {value!r}")
    return value


def all_told(*calls: Callable[[], T]) -> list[T]:
    """Returns the results of all calls; raises one ConfigError with a line for each mistake."""
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            problems.append(error)
    if problems:
        # Missing code is told from other mistakes by the causes (see `is_missing_code`).
        cause = next(filter(is_missing_code, problems), problems[0])
        raise ConfigError("\n".join(map(str, problems))) from cause
    return results
