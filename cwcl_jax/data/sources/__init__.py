"""Opens the sources that a source line names; see `base` for the form of the line."""

import difflib
from collections.abc import Callable

from cwcl_jax.data.sources.base import (
    Example,
    Source,
    SourceBase,
    SourceLine,
    call_with_options,
    parse_source_line,
)
from cwcl_jax.data.sources.mixture import Mixture
from cwcl_jax.data.sources.scenes import open_scenes

__all__ = ["SOURCE_KINDS", "Example", "Mixture", "Source", "SourceBase", "open_source"]

SOURCE_KINDS: dict[str, Callable[..., Source]] = {
    "scenes": open_scenes,
}


def open_source(line: str, *, cache_dir: str = "") -> Source:
    """Opens a source line; several parts joined by `::` become a `Mixture`.

    `cache_dir` receives the indexes of sources that cannot write beside their files.
    """
    lines = parse_source_line(line)
    weights = [_take_weight(part) for part in lines]
    sources = [_open_one(part, cache_dir) for part in lines]
    if len(sources) == 1:
        return sources[0]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ValueError(
            f"Some parts of the mixture {line!r} have weight= and some have not; give it to all "
            "(shares of the examples) or to none (shares as the lengths are)."
        )
    return Mixture(sources, given or None)


def _take_weight(line: SourceLine) -> float | None:
    text = line.options.get("weight")
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise ValueError(f"weight={text!r} of {line.kind}:{line.path} must be a positive number.")
    return weight


def _open_one(line: SourceLine, cache_dir: str) -> Source:
    if line.kind not in SOURCE_KINDS:
        close = difflib.get_close_matches(line.kind, SOURCE_KINDS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"There is no source of kind {line.kind!r}.{hint} Kinds: {', '.join(SOURCE_KINDS)}."
        )
    options = {key: value for key, value in line.options.items() if key != "weight"}
    plain = SourceLine(line.kind, line.path, options)
    source = call_with_options(SOURCE_KINDS[line.kind], plain, {"cache_dir": cache_dir})
    if len(source) == 0:
        raise ValueError(f"The source {line.kind}:{line.path} has no examples.")
    return source
