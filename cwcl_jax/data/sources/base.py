"""What a source of examples is, and the one line that names it in a config.

`kind:path?option=value&option=value`, several joined by `::`. A source is a random-access list of
examples, picklable and without jax. An example is a dict with an "id" and any of "image" (encoded
bytes or a PIL image), "text" (one caption or a list of them), "audio" (encoded bytes or a pair of
int16 samples and rate), "label" (an integer), "labels" (several, see `data.label_sets`) and
"features" (name -> vector).
"""

import difflib
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import numpy as np

Example = dict[str, Any]
ALL_FIELDS = ("image", "text", "audio", "label", "labels", "features")
# Options of a source line that every kind takes.
SHARED_OPTIONS = ("features_from", "weight")
NO_CLASSES = (
    "has no classes; choose a source with classes, or data.labels='text' for equal captions"
)

# What to do about labels that became floats.
OF_FLOATS = (
    " pandas makes floats of integers where some are missing: make them integers again, "
    ".astype('Int64') of a column and -1 for what is missing in an array, or strings."
)


class Source:
    """A random-access list of examples: all that the rest of the package asks of a source.

    A source of one's own derives from it and defines `__len__`, `read` and `fingerprint`.

    Attributes:
      class_names: class names in label order, where examples have labels.
      taken: the column or member that each field comes from, where a choice was made.
      templates: the data set's own prompt templates, with {c} for the class, where it has any.
      durations: length of every example (float64; seconds of recordings), where known without
        reading.
      embedded: names of the features that come with the examples.
      stores: feature caches (`data.embeddings.EmbeddingStore`) by name, which know their encoder.
      parts: the parts of a mixture, in order; () for any other source.
      weights: the share of each part of a mixture; None for shares by length.
    """

    class_names: Sequence[str] | None = None
    taken: Mapping[str, str] = MappingProxyType({})
    templates: Sequence[str] = ()
    durations: np.ndarray | None = None
    embedded: Sequence[str] = ()
    stores: Mapping[str, Sequence[Any]] = MappingProxyType({})
    parts: Sequence["Source"] = ()
    weights: Sequence[float] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int, fields: Collection[str]) -> Example:
        """Returns the example with at least `id`, and only the work that `fields` needs.

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

    @property
    def lacks(self) -> Mapping[str, str]:
        """Fields that no example has, with the reason and the remedy (see `require_fields`).

        A field that is not named here may be missing all the same: not every source knows.
        """
        return {} if self.class_names is not None else {"label": NO_CLASSES}

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        """Returns features of many examples at once, name -> float32 (len(indices), ...).

        None where there is no faster way than `read`, or where an example of them is unusable, of
        which `read` then says why.
        """
        del indices
        return None


class SourceAround(Source):
    """A source that changes something of another one, `source`, and passes on all else."""

    def __init__(self, source: Source):
        self.source = source

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

    @property
    def stores(self) -> Mapping[str, Sequence[Any]]:
        return self.source.stores

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, fields: Collection[str]) -> Example:
        return self.source.read(index, fields)


@dataclass(frozen=True)
class SourceLine:
    """One part of a source line."""

    kind: str
    path: str
    options: Mapping[str, str]


def parse_source_line(line: str) -> list[SourceLine]:
    """Splits a source line; raises ValueError with the form it should have."""
    parts: list[SourceLine] = []
    for part in line.split("::"):
        kind, colon, rest = part.strip().partition(":")
        if parts and (not colon or "/" in kind):
            # A bare path has the kind of the part before it.
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
    opener: Callable[..., Any], first: Any, line: SourceLine, shared: Mapping[str, Any]
) -> Any:
    """Calls `opener(first, option=value...)`, options converted as its annotations say.

    A parameter that is annotated with a dataclass stands for options named after its fields.
    `shared` holds values that the opener may ask for by name, such as a cache folder.
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
                f"A source of kind {line.kind!r} has no option {name!r}.{hint} It has: "
                f"{', '.join(sorted([*known, *SHARED_OPTIONS]))}."
            )
        arguments[name] = _convert(line.kind, name, value, _type_of(known[name]))
    for name, group in groups.items():
        own = inspect.signature(group).parameters.keys() & arguments.keys()
        arguments[name] = group(**{option: arguments.pop(option) for option in own})
    return opener(first, **arguments)


def _type_of(parameter: inspect.Parameter) -> Any:
    """What an option is annotated with, else the type of its default; a user's may say neither."""
    said = parameter.annotation
    if isinstance(said, str):  # of a module with postponed annotations
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


def require_fields(source: Source, fields: Collection[str], name: str) -> None:
    """Raises ValueError where no example of the source has one of the fields."""
    for field in sorted(set(fields) & set(source.lacks)):
        raise ValueError(f"{name!r} {source.lacks[field]}.")


def columns_taken(source: Source) -> list[str]:
    """What each field comes from, "image from filepath, text from title", for every part."""
    told = [", ".join(f"{field} from {column}" for field, column in source.taken.items())]
    return [*filter(None, told), *(line for part in source.parts for line in columns_taken(part))]


def fingerprint_of(*parts: object) -> str:
    """A short stable hash of what the parts print as."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]
