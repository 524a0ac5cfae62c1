"""The interface of sources of examples, and the line that names a source in a config.

The format is `kind:path?option=value&option=value`; several parts are joined by `::`. A source is a
random-access list of examples, picklable and without jax. An example is a dict with an "id" and any
of "image" (encoded bytes or a PIL image), "text" (one caption or a list of them), "audio" (encoded
bytes or a pair of int16 samples and rate), "label" (an integer), "labels" (several, see
`data.label_sets`), "features" (name -> vector) and "variants" (name -> (variants, ...)). The latter
are the vectors from which training draws, if a feature cache holds several for an example; the
vector in "features" is the first of them.
"""

import difflib
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import numpy as np

from cwcl_jax.data.skipping import BadExample

Example = dict[str, Any]
ALL_FIELDS = ("image", "text", "audio", "label", "labels", "features")
# Options of a source line that every kind takes.
SHARED_OPTIONS = ("features_from", "columns_from", "weight")
NO_CLASSES = (
    "has no classes; choose a source with classes, or data.labels='text' for equal captions"
)


class WrongOrder(ValueError):
    """A row of a file beside a source belongs to another example than the source's."""


# Remedy for labels that became floats.
OF_FLOATS = (
    " pandas converts integers to floats if some are missing: convert them back (a column by "
    ".astype('Int64'), an array with -1 for missing ones), or use strings."
)


class Source:
    """A random-access list of examples: the interface of all sources.

    A user's source derives from it and defines `__len__`, `read` and `fingerprint`.

    Attributes:
      class_names: class names in label order, if examples have labels.
      taken: the column or member that each field comes from, if there was a choice.
      templates: the data set's own prompt templates, with {c} for the class, if it has any.
      durations: length of every example (float64; seconds of recordings), if known without reading.
      column_names: columns that `column` knows in addition to "label" and "text", if known.
      embedded: names of the features that come with the examples.
      stores: feature caches (`data.embeddings.EmbeddingStore`) by name, which know their encoder.
      parts: the parts of a mixture, in order; () for any other source.
      weights: the share of each part of a mixture; None for shares by length.
    """

    class_names: Sequence[str] | None = None
    taken: Mapping[str, str] = MappingProxyType({})
    templates: Sequence[str] = ()
    durations: np.ndarray | None = None
    column_names: Sequence[str] = ()
    embedded: Sequence[str] = ()
    stores: Mapping[str, Sequence[Any]] = MappingProxyType({})
    parts: Sequence["Source"] = ()
    weights: Sequence[float] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int, fields: Collection[str]) -> Example:
        """Returns the example with at least `id`, doing only the work that `fields` need.

        Raises:
          BadExample: a field of it cannot be read. The example is counted and skipped.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Returns a text that changes when the examples, or their order, change."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} examples; asked for {index}")
        return self.read(index, ALL_FIELDS)

    def column(self, name: str) -> np.ndarray:
        """Returns a value of every example, (n,): numbers, or objects (strings, None if missing).

        By default there are "label" and "text", the first caption in lower case (as
        `data.labels="text"` compares it). All examples are read for it, one by one.

        Raises:
          ValueError: there is no such column.
        """
        if name not in ("label", "text"):
            known = [*self.column_names, "label", "text"]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"the data has no column {name!r}{hint} There are {', '.join(dict.fromkeys(known))}"
                f"; columns_from={name}:FILE in the source line reads one from a file"
            )
        require_fields(self, (name,), "the data")
        return as_column(_value_of(self, index, name) for index in range(len(self)))

    @property
    def lacks(self) -> Mapping[str, str]:
        """Fields that no example has, with the reason and the remedy (see `require_fields`).

        The list may be incomplete: not every source knows which fields are missing.
        """
        return {} if self.class_names is not None else {"label": NO_CLASSES}

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        """Returns features of many examples at once, name -> float32 (len(indices), ...).

        None if there is no faster way than `read`, or if one of them is unusable; `read` then says
        why.
        """
        del indices
        return None


class SourceAround(Source):
    """A source that changes something of another one, `source`, and delegates everything else."""

    def __init__(self, source: Source):
        self.source = source
        self.column_names = source.column_names

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    @property
    def taken(self) -> Mapping[str, str]:
        return self.source.taken

    @property
    def templates(self) -> Sequence[str]:
        return self.source.templates

    @property
    def durations(self) -> np.ndarray | None:
        return self.source.durations

    @property
    def lacks(self) -> Mapping[str, str]:
        return self.source.lacks

    @property
    def embedded(self) -> Sequence[str]:
        return self.source.embedded

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)

    @property
    def stores(self) -> Mapping[str, Sequence[Any]]:
        return self.source.stores

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, fields: Collection[str]) -> Example:
        return self.source.read(index, fields)


class SameExamples(SourceAround):
    """A `SourceAround` with the same examples in the same order, so with the parts of a mixture."""

    @property
    def weights(self) -> Sequence[float] | None:
        return self.source.weights

    @property
    def parts(self) -> Sequence[Source]:
        """The examples of each part of a mixture, as this source changes them."""
        from cwcl_jax.data.sources.subset import Subset  # it derives from a class of this module

        ends = np.cumsum([len(part) for part in self.source.parts]).tolist()
        starts = [0, *ends]
        return [Subset(self, range(*pair)) for pair in zip(starts, ends, strict=False)]


@dataclass(frozen=True)
class SourceLine:
    """One part of a source line."""

    kind: str
    path: str
    options: Mapping[str, str]


def parse_source_line(line: str) -> list[SourceLine]:
    """Returns the parts of a source line; a ValueError states the expected format."""
    parts: list[SourceLine] = []
    for part in line.split("::"):
        kind, colon, rest = part.strip().partition(":")
        if parts and (not colon or "/" in kind or rest.startswith("//")):
            # A path without a kind has the kind of the previous part.
            kind, colon, rest = parts[-1].kind, ":", part.strip()
        path, _, query = rest.partition("?")
        if not colon or not kind or "/" in kind:
            raise ValueError(
                f"The source line {line!r} has the part {part!r} without a kind. Write "
                "kind:path?option=value, for example scenes:train or "
                "tars:/data/cc12m/{00000..01242}.tar."
            )
        options = {}
        for item in filter(None, query.split("&")):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(
                    f"The option {item!r} in {line!r} has no value; write {item}=value."
                )
            options[key] = unquote(value)
        parts.append(SourceLine(kind, path, options))
    return parts


def call_with_options(
    opener: Callable[..., Any],
    first: Any,
    line: SourceLine,
    shared: Mapping[str, Any],
    *,
    what: str = "source of kind",
    further: Sequence[str] = SHARED_OPTIONS,
) -> Any:
    """Returns `opener(first, option=value...)`, with options converted to its annotated types.

    A parameter that is annotated with a dataclass stands for options named after its fields.

    Args:
      shared: values that the opener may request by name, such as a cache folder.
      what: is opened, in words.
      further: options that someone else reads.
    """
    parameters = list(inspect.signature(opener).parameters.values())[1:]
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }
    known = {p.name: p for p in parameters if p.name not in {*shared, *groups}}
    for group in groups.values():
        known |= inspect.signature(group).parameters
    arguments = {p.name: shared[p.name] for p in parameters if p.name in shared}
    for name, value in line.options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"A {what} {line.kind!r} has no option {name!r}.{hint} It has: "
                f"{', '.join(sorted([*known, *further])) or 'none'}."
            )
        arguments[name] = _convert(line.kind, name, value, _type_of(known[name]))
    for name, group in groups.items():
        own = inspect.signature(group).parameters.keys() & arguments.keys()
        arguments[name] = group(**{option: arguments.pop(option) for option in own})
    return opener(first, **arguments)


def _type_of(parameter: inspect.Parameter) -> Any:
    """Returns the annotation of an option, else the type of its default, else `str`."""
    said = parameter.annotation
    if isinstance(said, str):  # the module has postponed annotations
        return {"int": int, "float": float, "bool": bool}.get(said, str)
    if said is not parameter.empty:
        return said
    return str if parameter.default in (parameter.empty, None) else type(parameter.default)


def _convert(kind: str, name: str, value: str, annotation: Any) -> Any:
    if annotation is str:
        return value
    if annotation is bool:
        if value.lower() in ("1", "true", "yes"):
            return True
        if value.lower() in ("0", "false", "no"):
            return False
        raise ValueError(f"Option {name}={value!r} of {kind!r} must be true or false.")
    try:
        return annotation(value)
    except ValueError as error:
        raise ValueError(
            f"Option {name}={value!r} of {kind!r} must be of type {annotation.__name__}."
        ) from error


def as_column(values: Iterable[Any]) -> np.ndarray:
    """Returns (n,) objects, even if the values are sequences."""
    listed = list(values)
    column = np.empty(len(listed), object)
    column[:] = listed
    return column


def _value_of(source: Source, index: int, field: str) -> Any:
    try:
        value = source.read(index, (field,)).get(field)
    except BadExample:
        return None
    value = value[0] if isinstance(value, list) and value else value
    return value.casefold() if isinstance(value, str) else value


def require_fields(source: Source, fields: Collection[str], name: str) -> None:
    """Raises ValueError if no example of the source has one of the fields."""
    for field in sorted(set(fields) & set(source.lacks)):
        raise ValueError(f"{name!r} {source.lacks[field]}.")


def columns_taken(source: Source) -> list[str]:
    """Returns the origin of each field, "image from filepath, text from title", for every part."""
    if isinstance(source, SourceAround):
        return columns_taken(source.source)
    told = [", ".join(f"{field} from {column}" for field, column in source.taken.items())]
    return [*filter(None, told), *(line for part in source.parts for line in columns_taken(part))]


def fingerprint_of(*parts: object) -> str:
    """Returns a short stable hash of the printed parts."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]
