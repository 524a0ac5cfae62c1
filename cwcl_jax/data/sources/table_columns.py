"""Chooses the columns of a table with pictures, texts, recordings or labels."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cwcl_jax.data.sources.tar_index import PARTS

FILE_FIELDS = ("image", "audio")
_USUAL_NAMES = {
    "image": ("filepath", "image", "image_path", "file_name", "img"),
    "text": ("title", "text", "caption", "captions", "sentence"),
    "audio": ("audio_filepath", "audio", "audio_path", "path", "wav"),
    "label": ("label", "intent", "class"),
    "duration": ("duration",),
}


def named_fields(
    columns: Sequence[str], path: str, rows: Sequence[Mapping[str, Any]], asked: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns field -> column, and reasons for fields whose column is unclear.

    Columns are used as named, or by their usual names (ignoring case) if none is named and only one
    has such a name. Columns of files are accepted by the files' type, as far as `rows` show it.
    """
    fields, unclear = {}, {}
    for field, name in asked.items():
        if name:
            require_column(name, columns, path, field)
        may_be = [column for column in columns if column.lower() in _USUAL_NAMES[field]]
        if field in FILE_FIELDS:
            may_be = [column for column in may_be if _type_of_files(column, rows) in ("", field)]
            may_be += [
                column
                for other in FILE_FIELDS
                for column in columns
                if other != field and column.lower() in _USUAL_NAMES[other]
                if _type_of_files(column, rows) == field
            ]
        if name or len(may_be) == 1:
            fields[field] = name or may_be[0]
        elif may_be:
            unclear[field] = (
                f"has {len(may_be)} columns that could be the {field} ({', '.join(may_be)}); "
                f"choose with {field}=COLUMN"
            )
    if "audio" not in fields:
        fields.pop("duration", None)
    if not fields:
        if unclear:
            raise ValueError(f"{path} {next(iter(unclear.values()))}.")
        known = "; ".join(f"{field}: {', '.join(names)}" for field, names in _USUAL_NAMES.items())
        raise ValueError(
            f"No column of {path} has a known name ({known}); name them with image=, text=, "
            f"audio= or label=.{_told(columns)}"
        )
    return fields, unclear


def require_column(name: str, columns: Sequence[str], path: str, option: str) -> None:
    """Raises ValueError if a table lacks a column that an option names."""
    if name not in columns:
        close = difflib.get_close_matches(name, columns, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{path} has no column {name!r} (asked for as {option}=).{hint}{_told(columns)}"
        )


def _told(columns: Sequence[str]) -> str:
    """Returns the columns as text for users, with the remedy for a wrong separator."""
    if not columns:
        return " It is empty."
    marks = {"\t": "tab", ";": "semicolon", ",": "comma", "|": "|"}
    found = [name for mark, name in marks.items() if len(columns) == 1 and mark in columns[0]]
    hint = f" Its fields may have another separator: add sep={found[0]}." if found else ""
    return f" Its columns: {', '.join(columns)}.{hint}"


def _type_of_files(column: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns "image" or "audio" by the extensions of a column's file names; "" if unknown."""
    endings = {Path(str(row.get(column) or "")).suffix.lower().removeprefix(".") for row in rows}
    kinds = {field for field in FILE_FIELDS if endings & set(PARTS[field])}
    return kinds.pop() if len(kinds) == 1 else ""


def column_hint(columns: Sequence[str]) -> str:
    return f"; name the column with image=, text= or audio= (it has {', '.join(columns)})"
