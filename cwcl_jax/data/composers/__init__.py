"""Composers of batches, which determine the examples that share a batch: by name, or users' own.

`groups:COLUMN?k=1`, `near:FEATURES?share=0.5&size=8`, or `module:function?option=value`, in the
format of a source line. `base` describes what a composer returns.
"""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cwcl_jax.data.composers.base import ComposedOrder, ComposerError, Composition
from cwcl_jax.data.composers.groups import compose_groups
from cwcl_jax.data.composers.near import check_cells, compose_near
from cwcl_jax.data.composers.own import Own
from cwcl_jax.data.sources.base import (
    Source,
    SourceLine,
    call_with_options,
    parse_source_line,
)
from cwcl_jax.extension import CodeError, import_named

__all__ = [
    "COMPOSERS", "ComposedOrder", "ComposerError", "Composition", "check_settings", "compose",
    "features_read", "own_composer",
]  # fmt: skip

COMPOSERS: dict[str, Callable[..., Composition]] = {"groups": compose_groups, "near": compose_near}


def compose(line: str, source: Source, batch_size: int, seed: int) -> Composition:
    """Returns the batches that a line composes from a source.

    Raises:
      ComposerError: there is no such composer or option, or the batches cannot be composed from
        this source.
    """
    shared = {"source": source, "batch_size": batch_size, "seed": seed}
    with _composer_errors():
        parsed = _parsed(line)
        if parsed.kind not in COMPOSERS:
            return Own(_function(parsed.kind), parsed, **shared)
        made = COMPOSERS[parsed.kind]
        return call_with_options(made, parsed.path, parsed, shared, what="composer", further=())


def check_settings(line: str, batch_size: int) -> None:
    """Raises ComposerError for options of `near:` that no features can make right."""
    with _composer_errors():
        parsed = _parsed(line)
        if parsed.kind == "near":
            shared = {"batch_size": batch_size}
            call_with_options(check_cells, parsed.path, parsed, shared, what="composer", further=())


@contextmanager
def _composer_errors() -> Iterator[None]:
    """Converts errors about a line's options to ComposerErrors."""
    try:
        yield
    except ComposerError:
        raise
    except ValueError as error:
        raise ComposerError(str(error)) from error


def _function(name: str) -> Callable[..., Any]:
    """Returns a user's composer; an error mentions a built-in one with a similar name."""
    try:
        return import_named(name, "composer")
    except CodeError as error:
        close = difflib.get_close_matches(name.partition(":")[0], COMPOSERS, 1)
        hint = f"; did you mean '{close[0]}:'?" if close else ""
        raise ComposerError(f"{error}{hint}") from error


def own_composer(line: str) -> list[str]:
    """Returns the "module:function" of a line with a user's composer, else []; imports nothing."""
    try:
        kind = _parsed(line).kind if line else ""
    except ValueError:
        return []
    return [kind] if kind and kind not in COMPOSERS else []


def features_read(line: str) -> str:
    """Returns the name of the features that a line of `config.data.batches` reads, or "".

    Only `near:` reads features.
    """
    try:
        parsed = _parsed(line)
    except ValueError:
        return ""
    return parsed.path if parsed.kind == "near" else ""


def _parsed(line: str) -> SourceLine:
    """Returns the parts of a line; the kind of a user's composer is its "module:function".

    Raises:
      ComposerError: the line is not one composer.
    """
    parts = parse_source_line(line)
    if len(parts) != 1:
        raise ComposerError(f"{line!r} names {len(parts)} composers; name exactly one")
    (part,) = parts
    if part.kind in COMPOSERS:
        return part
    if not part.path.isidentifier():
        close = difflib.get_close_matches(part.kind, COMPOSERS, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ComposerError(
            f"{line!r} names no composer{hint}; there are {', '.join(COMPOSERS)}, and "
            "module:function of your own"
        )
    return SourceLine(f"{part.kind}:{part.path}", "", part.options)
