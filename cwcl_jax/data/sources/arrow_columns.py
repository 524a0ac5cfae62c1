"""Which column of an Arrow schema is the picture, the caption, the label: named, or by type.

Columns that the line does not name are taken from the features that Hugging Face's `datasets`
stores (Image, Audio, ClassLabel), else by a usual name with a fitting type, and only if there is
just one. If there are several, the field is missing and `lacks` says which option chooses. Raw
inputs and features are never guessed. A column may be inside structs: `json.caption`.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from cwcl_jax.data.sources.base import NO_CLASSES, OF_FLOATS
from cwcl_jax.data.sources.named import ColumnOptions, parse_names

_MEDIA = ("Image", "Audio")
FIELDS = ("image", "audio", "text", "label", "id")
_USUAL = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture"),
    "audio": ("audio", "wav", "flac", "mp3", "speech", "sound"),
    "text": ("text", "txt", "caption", "captions", "title", "sentence", "sentences"),
    "label": ("label", "class", "cls", "intent"),
    "id": ("id", "__key__", "key"),
}
_WANTED = {
    "image": "bytes, a path, or a struct of bytes and path",
    "audio": "bytes, a path, or a struct of bytes and path",
    "text": "a string or a list of strings",
    "label": "an integer or a string",
    "labels": "integers or strings, or lists of them",
    "id": "an integer or a string",
    "raw": "numbers, or lists of numbers of any depth",
    "features": "numbers, or lists of numbers of any depth",
}


@dataclass(frozen=True)
class Columns:
    """Paths of columns by their use; `class_names` of integer labels, if they are stored.

    Attributes:
      fields: "image", "audio", "label" or "id" -> path.
      text, labels: the columns of captions, and of sets of labels.
      raw, features: name of the field or modality -> path.
      lacks: fields that no example has, with the reason and the remedy.
    """

    fields: Mapping[str, str]
    text: tuple[str, ...] = ()
    raw: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def tops(self, fields: Collection[str]) -> list[str]:
        """Returns the columns to read for some fields of an example; the id is always included."""
        paths = [path for name, path in self.fields.items() if name in fields or name == "id"]
        paths += self.text if "text" in fields else ()
        paths += self.labels if "labels" in fields else ()
        paths += [path for name, path in self.raw.items() if name in fields]
        paths += self.features.values() if "features" in fields else ()
        return list(dict.fromkeys(path[0] for path in map(split_path, paths)))

    def all_fields(self) -> list[str]:
        """Returns every field that an example can have."""
        named = [*self.fields, *self.raw]
        several = {"text": self.text, "labels": self.labels, "features": self.features}
        return named + [name for name, columns in several.items() if columns]

    def said(self) -> str:
        """Returns everything that determines the examples, for fingerprints."""
        said = (sorted(self.fields.items()), self.text, sorted(self.raw.items()),
                sorted(self.features.items()), self.class_names)  # fmt: skip
        return repr((*said, self.labels) if self.labels else said)


def split_path(path: str) -> tuple[str, ...]:
    """Returns the top column and the members inside it.

    `paths_of` writes dots in names as "\\x00".
    """
    return tuple(part.replace("\x00", ".") for part in path.split("."))


def choose_columns(schema: pa.Schema, options: ColumnOptions, name: str) -> Columns:
    """Returns the columns that the options choose from a schema.

    Raises:
      ValueError: a named column does not exist or has an unsuitable type, or nothing usable is
          left.
    """
    there = _There(name, _paths_of(schema), stored_features(schema))
    raw, features = parse_names(options.raw, options.features)
    raw = {key: there.find(path, f"raw={key}", "raw") for key, path in raw.items()}
    features = {k: there.find(p, f"features={k}", "features") for k, p in features.items()}
    labels = tuple(
        there.find(name, "labels", "labels") for name in options.labels.split(",") if name
    )
    chosen: dict[str, list[str]] = {}
    lacks: dict[str, str] = {}
    for kind in FIELDS:
        chosen[kind] = _asked(kind, getattr(options, kind), there)
        if kind in raw and chosen[kind]:
            raise ValueError(f"{kind} of {name} is named by {kind}= and by raw=; choose one.")
        if kind in raw or chosen[kind]:
            continue
        may_be = there.candidates(kind, {*raw.values(), *features.values()})
        # For ids the first of the usual names is used; for other fields no name is preferred.
        chosen[kind] = may_be[:1] if kind == "id" else may_be if len(may_be) == 1 else []
        if may_be and not chosen[kind]:
            lacks[kind] = (
                f"has {len(may_be)} columns that could be the {kind} "
                f"({', '.join(map(_shown, may_be))}); choose with {kind}=COLUMN"
            )
    text = tuple(chosen.pop("text"))
    fields = {kind: paths[0] for kind, paths in chosen.items() if paths}
    if not (text or raw or features or fields.keys() - {"id"}):
        raise there.nothing(lacks)
    names = there.stored.get(fields.get("label", ""), {}).get("names")
    columns = Columns(fields, text, raw, features, tuple(names) if names else None, labels=labels)
    return replace(columns, lacks=_missing(columns, lacks, there))


def _asked(kind: str, option: str, there: "_There") -> list[str]:
    """Returns the paths of the columns that an option names."""
    names = [part for part in option.split(",") if part]
    if len(names) > 1 and kind != "text":
        raise ValueError(f"{kind}={option!r} of {there.name} must be one column.")
    return [there.find(name, kind, kind) for name in names]


def _missing(columns: Columns, known: Mapping[str, str], there: "_There") -> dict[str, str]:
    """Returns reasons for missing fields: the usual fields, and unused lists of numbers."""
    has = {*columns.all_fields(), *known}
    lacks = dict(known)
    for kind in ("image", "audio", "text"):
        if kind not in has:
            lacks[kind] = f"has no {kind}; name its column with {kind}= (it has {there.listed()})"
    if "label" not in has:
        lacks["label"] = f"{NO_CLASSES}, or name a column with label="
    used = {*columns.raw.values(), *columns.features.values()}
    for path, type_ in there.types.items():
        name = _shown(path)
        if path not in used and name not in has and _is_list(type_) and _fits("raw", type_):
            lacks.setdefault(
                name,
                f"has a column {name!r} that the line does not use; add raw={name} or "
                f"features={name}",
            )
    return lacks


@dataclass(frozen=True)
class _There:
    """The columns of a source: their types by path, and stored features."""

    name: str
    types: Mapping[str, pa.DataType]
    stored: Mapping[str, Mapping[str, Any]]

    def listed(self) -> str:
        return ", ".join(f"{_shown(path)} ({kind})" for path, kind in self.types.items())

    def find(self, asked: str, option: str, kind: str) -> str:
        """Returns the path of a column that is named, or whose names are joined with dots.

        Raises:
          ValueError: there is no such column, or its type does not fit.
        """
        paths = [path for path in self.types if _shown(path) == asked]
        if not paths:
            close = difflib.get_close_matches(asked, map(_shown, self.types), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{self.name} has no column {asked!r} (asked for by {option}=).{hint} Its columns: "
                f"{self.listed()}."
            )
        # A column of exactly this name takes precedence over a member of a struct.
        path = min(paths, key=lambda path: path.count("."))
        if not _fits(kind, self.types[path]):
            floats = kind in ("label", "labels") and pat.is_floating(self.types[path])
            raise ValueError(
                f"The column {asked!r} of {self.name} is {self.types[path]}, so it cannot be "
                f"{option}=, which takes {_WANTED[kind]}.{OF_FLOATS if floats else ''}"
            )
        return path

    def candidates(self, kind: str, used: Collection[str]) -> list[str]:
        """Returns unnamed columns that may be a field, in the order of the usual names."""
        wanted = {"image": "Image", "audio": "Audio", "label": "ClassLabel"}.get(kind)
        sure = [p for p, feature in self.stored.items() if feature.get("_type") == wanted]
        if sure and wanted:
            return [path for path in sure if path not in used]
        media = {p for p, feature in self.stored.items() if feature.get("_type") in _MEDIA}
        by_name = {path.lower(): path for path in self.types if path not in {*used, *media}}
        found = [by_name[name] for name in _USUAL[kind] if name in by_name]
        # A string may be the path of a picture, but this is not certain, so it must be named.
        strings = kind not in ("image", "audio")
        return [
            path
            for path in found
            if _fits(kind, self.types[path]) and (strings or not _is_string(self.types[path]))
        ]

    def nothing(self, doubts: Mapping[str, str]) -> ValueError:
        """Returns the error for a source without any usable column."""
        said = "".join(f" It {doubt}." for doubt in doubts.values())
        return ValueError(
            f"No column of {self.name} is clearly a picture, a recording, a caption or a label."
            f"{said} Name columns with image=, audio=, text=, label=, raw= or features=. Its "
            f"columns: {self.listed()}."
        )


def stored_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns column -> feature from `datasets`' metadata of a schema; {} without it."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    if not isinstance(stored, dict):
        return {}
    known = {name: value for name, value in stored.items() if isinstance(value, dict)}
    return {_hidden(name): value for name, value in known.items() if name in schema.names}


def _hidden(name: str) -> str:
    return name.replace(".", "\x00")


def _shown(path: str) -> str:
    return path.replace("\x00", ".")


def _paths_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Returns the type of every column, and of every member of structs, by path."""
    found: dict[str, pa.DataType] = {}

    def add(path: str, kind: pa.DataType) -> None:
        found[path] = kind
        inner = kind.value_type if _is_list(kind) and pat.is_struct(kind.value_type) else kind
        if pat.is_struct(inner) and not _is_media(inner):
            for member in inner:
                inside = member.type if inner is kind else pa.list_(member.type)
                add(f"{path}.{_hidden(member.name)}", inside)

    for column in schema:
        add(_hidden(column.name), plain_type(column.type))
    return found


def _fits(kind: str, type_: pa.DataType) -> bool:
    """Returns whether a column of this type can be a field; a column of nulls can be any."""
    if pat.is_null(type_):
        return True
    if kind in ("image", "audio"):
        return is_bytes(type_) or _is_string(type_) or _is_media(type_)
    if kind == "text":
        return _is_string(type_) or (_is_list(type_) and _is_string(type_.value_type))
    if kind == "labels" and _is_list(type_):
        type_ = plain_type(type_.value_type)
    if kind in ("label", "labels", "id"):
        return (
            pat.is_integer(type_)
            or _is_string(type_)
            or (kind == "label" and pat.is_boolean(type_))
        )
    while _is_list(type_):
        type_ = plain_type(type_.value_type)
    return pat.is_integer(type_) or pat.is_floating(type_) or pat.is_boolean(type_)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type without extension and dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pat.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    kind = plain_type(kind)
    return pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Returns whether values are bytes of any of Arrow's kinds."""
    return (
        pat.is_binary(kind)
        or pat.is_large_binary(kind)
        or pat.is_binary_view(kind)
        or pat.is_fixed_size_binary(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind)


def _is_media(kind: pa.DataType) -> bool:
    """Returns whether a type is a struct of bytes and path, as `datasets` stores media."""
    return pat.is_struct(kind) and {member.name for member in kind} == {"bytes", "path"}
