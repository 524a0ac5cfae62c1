"""Tables that name files: CSV and TSV pairs (OpenCLIP's convention) and JSONL manifests."""

import csv
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.copies import local_copy
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import NO_CLASSES, Example, Source, as_column, fingerprint_of
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import below, read_bytes, require_text_file
from cwcl_jax.data.sources.table_columns import (
    FILE_FIELDS,
    column_hint,
    named_fields,
    require_column,
)
from cwcl_jax.data.sources.texts import captions_of
from cwcl_jax.files import parse_json
from cwcl_jax.paths import StoreError, StorePath, to_path

_LOG = logging.getLogger(__name__)
_SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
# Rows whose file names are examined to distinguish pictures from recordings.
_TYPES_LOOKED_AT = 100
# Files that a fingerprint reads: enough to distinguish data sets, few enough to be quick.
_FILES_LOOKED_AT, _HEAD_BYTES = 64, 1 << 16
# Separates several captions in one string of a column.
_NEXT_CAPTION = "\x1e"
# Key under which a row holds the cells of all columns with labels.
_LABELS = "\x1elabels"


class TableSource(Source):
    """Rows with strings; image and audio columns hold paths, relative ones below `root`.

    Labels are numbers into `class_names`; several captions are stored in one string
    (`join_captions`). `durations` are the seconds of every recording, if a table or its release
    lists them. `hint` says, if a field is missing, what would provide it.
    """

    def __init__(
        self,
        columns: Mapping[str, StringColumn],
        *,
        root: str | Path,
        class_names: Sequence[str] | None = None,
        durations: np.ndarray | None = None,
        hint: str = "",
    ):
        self.columns = dict(columns)
        self._durations = durations
        self.hint = hint
        # Reads the rows of the file again, for columns that examples do not have.
        self.column_names: Sequence[str] = ()
        self.read_rows: Callable[[], Iterable[Mapping[str, Any]]] = tuple
        # Reasons for fields without a column although several columns fit.
        self.unclear: dict[str, str] = {}
        self.root = to_path(root)
        self._class_names = None if class_names is None else list(class_names)
        self._length = len(next(iter(self.columns.values())))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    @property
    def durations(self) -> np.ndarray | None:
        return self._durations

    @property
    def lacks(self) -> Mapping[str, str]:
        missing = [name for name in ("image", "text", "audio") if name not in self.columns]
        lacks = {name: f"has no {name}{self.hint}" for name in missing}
        if "label" not in self.columns:
            lacks["label"] = NO_CLASSES
        return lacks | self.unclear

    def __len__(self) -> int:
        return self._length

    def read(self, index: int, fields: Collection[str]) -> Example:
        example: Example = {"id": self._id(index)}
        for name, column in self.columns.items():
            value = column[index] if name in fields else None
            if value is None:
                continue
            if name in FILE_FIELDS:
                example[name] = read_bytes(self.locate(value))
            elif name == "label":
                example[name] = int(value)
            elif name == "labels":
                example[name] = json.loads(value)
            else:
                captions = value.split(_NEXT_CAPTION)
                example[name] = captions if len(captions) > 1 else value
        return example

    def column(self, name: str) -> np.ndarray:
        if name not in self.column_names:
            return super().column(name)
        values = as_column(row.get(name) for row in self.read_rows())
        if len(values) != len(self):
            raise ValueError(
                f"the file has {len(values)} rows now, but had {len(self)} when it was opened"
            )
        return values

    def locate(self, name: str) -> Path:
        """Returns the file that a path column refers to."""
        return below(self.root, name)

    def _id(self, index: int) -> str:
        for name in ("id", *FILE_FIELDS):
            if name in self.columns:
                return self.columns[name][index] or f"row {index}"
        return f"row {index}"

    def fingerprint(self) -> str:
        parts = [(name, column.digest_parts()) for name, column in sorted(self.columns.items())]
        # Lengths determine which examples share a batch.
        lengths = self._durations
        seconds = [] if lengths is None else [hashlib.sha256(lengths.tobytes()).hexdigest()]
        return fingerprint_of("table", self._class_names, parts, *seconds, *self._files)

    @functools.cached_property
    def _files(self) -> list[str]:
        """Hashes of some of the named files: equal tables may refer to other pictures."""
        made = [name for name in FILE_FIELDS if name in self.columns]
        rows = (
            np.unique(np.linspace(0, len(self) - 1, _FILES_LOOKED_AT).astype(int)) if made else ()
        )
        found = []
        for name in made:
            for row in rows:
                value = self.columns[name][int(row)]
                found.append("" if value is None else self._content(value))
        return found

    def _content(self, name: str) -> str:
        """Returns the size of a file and a hash of its beginning; "" if it cannot be read."""
        try:
            path = self.locate(name)
            if isinstance(path, StorePath):
                head, size = path.read_range(0, _HEAD_BYTES), path.stat().st_size
            else:
                with open(path, "rb") as opened:
                    head, size = opened.read(_HEAD_BYTES), os.fstat(opened.fileno()).st_size
            return f"{size}-{hashlib.sha256(head).hexdigest()[:16]}"
        except StoreError:
            raise
        except (OSError, ValueError, BadExample):
            return ""


def join_captions(captions: Sequence[str]) -> str:
    """Returns several captions as one string of a column."""
    return _NEXT_CAPTION.join(captions)


def table_of_rows(
    rows: Iterable[Mapping[str, Any]],
    fields: Mapping[str, str],
    root: str | Path,
    *,
    hint: str = "",
    named_classes: bool = False,
) -> TableSource:
    """Returns a table of rows (dicts); `fields` maps "image", "text", ... to their names there.

    "duration" is in seconds; a row without one may be of any length (inf). The rows are read one by
    one. With `named_classes`, numeric labels are names too.
    """
    columns = {name: StringColumn() for name in fields}
    for row in rows:
        for name, key in fields.items():
            columns[name].append(_as_text(row.get(key), name))
    names = None
    if "label" in columns:
        columns["label"], names = _numbered(columns["label"], named_classes)
    durations = None
    if "duration" in columns:
        column = columns.pop("duration")
        durations = known_seconds(listed_seconds(column))
    return TableSource(columns, root=root, class_names=names, durations=durations, hint=hint)


def listed_seconds(column: StringColumn) -> list[float]:
    """Returns the durations that a table lists, nan for missing ones.

    Raises:
      ValueError: most are 0, as written by a tool that could not read the files.
    """
    seconds = [_seconds(column[row]) for row in range(len(column))]
    zeros = sum(length == 0 for length in seconds)
    if zeros > len(seconds) / 2:
        raise ValueError(
            f"the column duration is 0 in {zeros} of {len(seconds)} rows, but no recording has "
            "length 0: write the seconds of the files, or leave the column out."
        )
    if zeros:
        _LOG.warning(
            "The duration is 0 in %d of %d rows; they count as unknown.", zeros, len(seconds)
        )
    return [length or math.nan for length in seconds]


def _seconds(text: str | None) -> float:
    """Returns a duration of a table; nan if it is not one."""
    try:
        seconds = float(text or "nan")
    except ValueError:
        return math.nan
    return seconds if 0 <= seconds < math.inf else math.nan


def known_seconds(seconds: Sequence[float]) -> np.ndarray | None:
    """Returns durations with infinity for nan: room for any length; None if none is known."""
    lengths = np.array(seconds, np.float64)
    unknown = np.isnan(lengths)
    if unknown.all():
        return None
    return np.where(unknown, math.inf, lengths)


def _as_text(value: Any, field: str) -> str | None:
    if field == "text":
        value = captions_of(value)
        return join_captions(value) if isinstance(value, list) else value
    if value is None:
        return None
    if field == "labels":
        return json.dumps(value)
    # An empty cell is not a class.
    return (str(value).strip() or None) if field == "label" else str(value)


def _numbered(labels: StringColumn, named: bool) -> tuple[StringColumn, list[str] | None]:
    """Returns labels as numbers, and their sorted names; None if they are numbers already.

    If numbers are names (`named`), they are sorted as numbers.
    """
    values = [labels[row] for row in range(len(labels))]
    known = sorted({value for value in values if value is not None})
    if all(value.isdecimal() for value in known):
        if not named:
            return labels, None
        known.sort(key=int)
    place = {name: str(number) for number, name in enumerate(known)}
    return StringColumn(None if value is None else place[value] for value in values), known


def open_delimited(
    path: str,
    *,
    image: str = "",
    text: str = "",
    audio: str = "",
    label: str = "",
    labels: str = "",
    duration: str = "",
    sep: str = "",
    quoting: str = "auto",
    root: str = "",
) -> TableSource:
    """Opens `csv:/x.tsv?image=filepath&text=title`; OpenCLIP's column names are the default.

    Without `sep` (tab, comma, semicolon or a character) the header line decides: a tab in it means
    tabs. With `quoting` on, quotation marks enclose fields; with off, they are text. auto is on for
    commas and off for tabs, because captions often hold single quotation marks, which would swallow
    the rows after them. A file with tabs that can be read in both ways is refused.
    """
    options = {"image": image, "text": text, "audio": audio, "label": label, "duration": duration}
    if quoting not in ("auto", "on", "off"):
        raise ValueError(f"quoting={quoting!r} of {path} must be auto, on or off.")
    delimiter = _SEPARATORS.get(sep, sep)
    if len(delimiter) > 1 or delimiter in ("\n", "\r", '"'):
        raise ValueError(f"sep={sep!r} of {path} must be tab, comma, semicolon or one character.")
    file = require_text_file(path, "The table")
    with open(local_copy(file), newline="", encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline()
        delimiter = delimiter or ("\t" if "\t" in header else ",")
        if quoting == "auto" and delimiter == "\t" and _may_be_quoted(file):
            raise ValueError(
                f"{path} has fields in quotation marks: set quoting=on if these enclose fields, as "
                "pandas and csv.writer write them, or quoting=off if they are part of the text."
            )
        quoted = quoting == "on" or (quoting == "auto" and delimiter != "\t")
        style = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        csv.field_size_limit(1 << 24)
        reader = csv.DictReader(
            chain([header], lines), delimiter=delimiter, quoting=style, strict=True
        )
        rows = _checked_rows(reader, path)
        first = next(rows, None)
        columns = [name for name in reader.fieldnames or [] if name]
        seen = [] if first is None else [first, *islice(rows, _TYPES_LOOKED_AT)]
        fields, unclear = named_fields(columns, path, seen, options)
        rows = chain(seen, rows)
        table = _table(rows, fields, unclear, labels, columns, path, root or file.parent)
    table.column_names = columns
    table.read_rows = functools.partial(_delimited_rows, file, path, delimiter, style)
    return table


def _delimited_rows(file: Path, path: str, delimiter: str, style: Any) -> Iterator[dict[str, str]]:
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        reader: Any = csv.DictReader(lines, delimiter=delimiter, quoting=style, strict=True)
        yield from _checked_rows(reader, path)


def _table(rows, fields, unclear, labels: str, columns, path: str, root: str | Path) -> TableSource:
    """Returns the table of rows, with the cells of the columns `labels` as sets of labels."""
    taken, named = dict(fields), [name for name in labels.split(",") if name]
    for name in named:
        require_column(name, columns, path, "labels")
    if named:
        rows = ({**row, _LABELS: [row.get(name) for name in named]} for row in rows)
        fields = {**fields, "labels": _LABELS}
        taken["labels"] = " and ".join(named)
    table = table_of_rows(rows, fields, root, hint=column_hint(columns))
    table.unclear, table.taken = unclear, taken
    return table


def _checked_rows(reader: csv.DictReader, path: str) -> Iterator[dict[str, str]]:
    """Yields the rows.

    Raises:
      ValueError: cells or quotation marks of a row do not match; the message names the line.
    """
    while True:
        line = max(reader.line_num, 1) + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, the row that starts in line {line}: {error}. Write quotation marks "
                "inside quoted cells twice, or set quoting=off if they are text."
            ) from error
        if any(row.get(None) or ()):
            raise ValueError(
                f"{path}, line {line} has more cells than the header, so a caption would lose its "
                "end. Put cells that hold the separator in quotation marks, or use tabs."
            )
        yield row


def open_jsonl(
    path: str,
    *,
    image: str = "",
    text: str = "",
    audio: str = "",
    label: str = "",
    labels: str = "",
    duration: str = "",
    root: str = "",
) -> TableSource:
    """Opens `jsonl:/manifest.jsonl?audio=audio_filepath&text=text`, one object a line.

    `duration` names the column with the seconds of recordings.
    """
    file = require_text_file(path, "The manifest")
    options = {"image": image, "text": text, "audio": audio, "label": label, "duration": duration}
    rows = rows_of_json_lines(file)
    first = list(islice(rows, 1000))
    columns = list(dict.fromkeys(key for row in first for key in row))
    fields, unclear = named_fields(columns, path, first, options)
    rows = chain(first, rows)
    if "audio" in fields:
        rows = _whole_recordings(rows, path)
    table = _table(rows, fields, unclear, labels, columns, path, root or file.parent)
    table.column_names = columns
    table.read_rows = functools.partial(rows_of_json_lines, file)
    return table


def _may_be_quoted(file: Path) -> bool:
    """Returns whether a file with tabs has quoted fields and can be parsed with quoting.

    An unpaired quotation mark, which is text, would swallow the rows after it.
    """
    with open(local_copy(file), newline="", encoding="utf-8-sig", errors="replace") as lines:
        if not any(line.startswith('"') or '\t"' in line for line in lines):
            return False
        lines.seek(0)
        csv.field_size_limit(1 << 24)
        try:
            widths = {len(row) for row in csv.reader(lines, delimiter="\t", strict=True) if row}
        except csv.Error:
            return False
    return len(widths) == 1


def _whole_recordings(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rows.

    Raises:
      ValueError: a row refers to a part of its file, as NeMo's manifests can.
    """
    for number, row in enumerate(rows, 1):
        if row.get("offset"):
            raise ValueError(
                f"{path}, row {number} begins at offset={row['offset']} of its recording, but "
                "recordings are read from their beginning: save the parts as separate files."
            )
        yield row


def rows_of_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file; a broken line gives an empty one, skipped when read."""
    with open(local_copy(file), encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                _LOG.warning("%s line %d is not a JSON object.", file, number)
                row = {}
            yield row
