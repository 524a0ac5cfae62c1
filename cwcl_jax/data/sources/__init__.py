"""Opens the sources that a source line names; `base` describes the format of the line."""

import difflib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

from cwcl_jax.data.sources.arrays import open_arrays
from cwcl_jax.data.sources.base import (
    SHARED_OPTIONS,
    Example,
    Source,
    SourceLine,
    WrongOrder,
    call_with_options,
    parse_source_line,
)
from cwcl_jax.data.sources.coco import open_coco
from cwcl_jax.data.sources.commands import open_commands
from cwcl_jax.data.sources.embedded import (
    Embedded,
    columns_beside,
    features_beside,
    open_embeddings,
)
from cwcl_jax.data.sources.folders import open_folder
from cwcl_jax.data.sources.made import open_made
from cwcl_jax.data.sources.mixture import Mixture
from cwcl_jax.data.sources.parquet import open_parquet
from cwcl_jax.data.sources.saved import open_saved
from cwcl_jax.data.sources.scenes import open_scenes
from cwcl_jax.data.sources.sentences import open_sentences
from cwcl_jax.data.sources.speech import (
    open_common_voice,
    open_slurp,
    open_speech_commands,
    open_spoken_digits,
    open_stop,
)
from cwcl_jax.data.sources.spoken import open_spoken
from cwcl_jax.data.sources.subset import Subset
from cwcl_jax.data.sources.tables import open_delimited, open_jsonl
from cwcl_jax.data.sources.tars import open_clip_benchmark, open_tars
from cwcl_jax.data.sources.tfds import open_tfds
from cwcl_jax.extension import import_named, is_reference
from cwcl_jax.paths import is_url

__all__ = [
    "SOURCE_KINDS",
    "Embedded",
    "Example",
    "Mixture",
    "Source",
    "Subset",
    "WrongOrder",
    "check_training_line",
    "open_source",
]

SOURCE_KINDS: dict[str, Callable[..., Source]] = {
    "scenes": open_scenes,
    "commands": open_commands,
    "sentences": open_sentences,
    "tars": open_tars,
    "clip_benchmark": open_clip_benchmark,
    "coco": open_coco,
    "csv": open_delimited,
    "tsv": open_delimited,
    "jsonl": open_jsonl,
    "folder": open_folder,
    "parquet": open_parquet,
    "hf": open_saved,
    "tfds": open_tfds,
    "common_voice": open_common_voice,
    "slurp": open_slurp,
    "stop": open_stop,
    "speech_commands": open_speech_commands,
    "fsdd": open_spoken_digits,
    "embeddings": open_embeddings,
    "arrays": open_arrays,
    "made": open_made,
    "spoken": open_spoken,
}

# Built-in kinds whose paths may be on an object store; users' own kinds may be, too.
_ON_STORES = (
    "tars", "clip_benchmark", "csv", "tsv", "jsonl", "coco", "parquet", "hf", "arrays",
    "embeddings", "spoken",
)  # fmt: skip


def open_source(line: str, *, cache_dir: str = "") -> Source:
    """Returns the source of a source line; parts joined by `::` become a `Mixture`.

    Every kind also takes `weight=` (its share in a mixture), `features_from=` (features of this
    source, separated by commas: folders of `cwcl_jax.embed`, or NAME:FILE with one row per
    example) and `columns_from=` (NAME:FILE, separated by commas, with one value per example).
    `cache_dir` receives the indexes of tars.
    """
    lines = parse_source_line(line)
    weights = [_weight(part) for part in lines]
    sources = [_open_one(part, cache_dir) for part in lines]
    if len(sources) == 1:
        return sources[0]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ValueError(
            f"Some parts of the mixture {line!r} have weight= and some have not; set it for all "
            "(shares of the examples) or for none (shares by length)."
        )
    return Mixture(sources, given or None)


def check_training_line(line: str) -> None:
    """Raises ValueError if a part of a line has no split and would default to the test data."""
    for part in parse_source_line(line):
        inner = part
        while inner.kind == "spoken":
            (inner,) = parse_source_line(inner.path)
        opener = SOURCE_KINDS.get(inner.kind)
        split = inspect.signature(opener).parameters.get("split") if opener else None
        if split is not None and split.default == "test" and "split" not in part.options:
            raise ValueError(
                f"{part.kind}:{part.path} without split= is the split test; choose the split to "
                "train on, for example split=train"
            )


def own_kinds(line: str) -> list[str]:
    """Returns the "module:name" of those parts of a line that are user-defined kinds.

    Nothing is imported or opened; an invalid line has no such parts.
    """
    try:
        parts = [part for part in parse_source_line(line) if part.kind not in SOURCE_KINDS]
    except ValueError:
        return []
    return [f"{part.kind}:{part.path.partition(':')[0]}" for part in parts if ":" in part.path]


def _weight(line: SourceLine) -> float | None:
    text = line.options.get("weight")
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"weight={text!r} of {line.kind}:{line.path} must be a positive number.")
    return weight


def _open_one(line: SourceLine, cache_dir: str) -> Source:
    if "embeds" in line.options:
        folder = line.options["embeds"]
        raise ValueError(
            f"The option embeds={folder} was renamed to features_from={folder}: a folder of "
            "python -m cwcl_jax.embed holds features, which are the head's input."
        )
    if is_url(line.path) and line.kind in SOURCE_KINDS and line.kind not in _ON_STORES:
        raise ValueError(
            f"{line.kind}:{line.path}: only the kinds {', '.join(_ON_STORES)} can be read from an "
            "object store; mount the bucket, or copy the files first"
        )
    line, opener = _opener(line)
    # The only place that expands `~` to the home folder: no shell expands it inside a source line.
    options = {
        key: os.path.expanduser(value)
        for key, value in line.options.items()
        if key not in SHARED_OPTIONS
    }
    plain = SourceLine(line.kind, os.path.expanduser(line.path), options)
    if line.kind == "spoken":
        source = _open_spoken(plain, cache_dir)
    else:
        source = _called(opener, plain, cache_dir)
    if len(source) == 0:
        raise ValueError(f"The source {line.kind}:{line.path} has no examples.")
    places = line.options.get("features_from")
    source = features_beside(places, source, cache_dir) if places else source
    columns = line.options.get("columns_from")
    return columns_beside(columns, source) if columns else source


def _called(opener: Callable[..., Any], line: SourceLine, cache_dir: str) -> Source:
    """Returns the source that the opener returns.

    Raises:
      ValueError: the opener of a user's kind fails in any way, or returns something else.
    """
    try:
        source = call_with_options(opener, line.path, line, {"cache_dir": cache_dir})
    except (TypeError, AttributeError, KeyError) as error:
        if not is_reference(line.kind):
            raise
        raise ValueError(
            f"source {line.kind!r} fails on {line.path!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(source, Source):
        raise ValueError(
            f"source {line.kind!r} returns a {type(source).__name__}, which is not a subclass of "
            "cwcl_jax.data.sources.Source"
        )
    return source


def _opener(line: SourceLine) -> tuple[SourceLine, Callable[..., Source]]:
    """Returns line and function that opens it; `module:name:PATH` names a user's own function."""
    if line.kind in SOURCE_KINDS:
        return line, SOURCE_KINDS[line.kind]
    name, colon, path = line.path.partition(":")
    if colon and name.isidentifier():
        own = f"{line.kind}:{name}"
        return SourceLine(own, path, line.options), import_named(own, "source")
    if line.path.isidentifier() and importlib.util.find_spec(line.kind.split(".")[0]):
        raise ValueError(
            f"The source {line.kind}:{line.path} has no path: write {line.kind}:{line.path}:PATH, "
            f"or {line.kind}:{line.path}: if it needs none."
        )
    close = difflib.get_close_matches(line.kind, SOURCE_KINDS, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"There is no source of kind {line.kind!r}.{hint} Kinds: {', '.join(SOURCE_KINDS)}, or "
        "module:function:PATH for one of your own."
    )


def _open_spoken(line: SourceLine, cache_dir: str) -> Source:
    """Opens `spoken:KIND:PATH?...`; options that `spoken` does not know go to the inner source."""
    own = set(inspect.signature(open_spoken).parameters) - {"cache_dir"}
    (inner,) = parse_source_line(line.path)
    theirs = {key: value for key, value in line.options.items() if key not in own}
    source = _open_one(SourceLine(inner.kind, inner.path, theirs), cache_dir)
    mine = {key: value for key, value in line.options.items() if key in own}
    shared = {"cache_dir": cache_dir}
    return call_with_options(open_spoken, source, SourceLine("spoken", line.path, mine), shared)
