"""Tables that name files: CSV and TSV pairs (OpenCLIP's convention), JSONL manifests, folders."""

import csv
import difflib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cwcl_jax.data.sources.base import Example, SourceBase, fingerprint_of
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import read_bytes, require
from cwcl_jax.data.sources.tar_index import PARTS

_LOG = logging.getLogger(__name__)
_SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";"}
_FILE_FIELDS = ("image", "audio")
# Between several captions in one string of a column.
_NEXT_CAPTION = "\x1e"


class Table(SourceBase):
    """Rows with strings; image and audio columns hold paths, relative ones below `root`.

    Labels are numbers into `class_names`; several captions stand in one string (`join_captions`).
    """

    def __init__(
        self,
        columns: Mapping[str, StringColumn],
        *,
        root: str | Path,
        class_names: Sequence[str] | None = None,
    ):
        self.columns = dict(columns)
        self.root = Path(root).expanduser()
        self._class_names = None if class_names is None else list(class_names)
        self._length = len(next(iter(self.columns.values())))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    def __len__(self) -> int:
        return self._length

    def read(self, index: int, fields: Collection[str]) -> Example:
        example: Example = {"id": self._id(index)}
        for name, column in self.columns.items():
            value = column[index] if name in fields else None
            if value is None:
                continue
            if name in _FILE_FIELDS:
                example[name] = read_bytes(self.locate(value))
            elif name == "label":
                example[name] = int(value)
            else:
                captions = value.split(_NEXT_CAPTION)
                example[name] = captions if len(captions) > 1 else value
        return example

    def locate(self, name: str) -> Path:
        """The file that a path column means."""
        return self.root / name

    def _id(self, index: int) -> str:
        for name in ("id", *_FILE_FIELDS):
            if name in self.columns:
                return self.columns[name][index] or f"row {index}"
        return f"row {index}"

    def fingerprint(self) -> str:
        parts = [(name, column.digest_parts()) for name, column in sorted(self.columns.items())]
        return fingerprint_of("table", self._class_names, parts)


def join_captions(captions: Sequence[str]) -> str:
    """Several captions as one string of a column."""
    return _NEXT_CAPTION.join(captions)


def table_of_rows(
    rows: Iterable[Mapping[str, Any]], fields: Mapping[str, str], root: str | Path
) -> Table:
    """A table of rows (dicts); `fields` maps "image", "text", ... to the names they have there."""
    values: dict[str, list[str | None]] = {name: [] for name in fields}
    for row in rows:
        for name, key in fields.items():
            values[name].append(_as_text(row.get(key)))
    names = None
    if "label" in values:
        values["label"], names = _numbered(values["label"])
    columns = {name: StringColumn(column) for name, column in values.items()}
    return Table(columns, root=root, class_names=names)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return join_captions([str(item) for item in value]) if isinstance(value, list) else str(value)


def _numbered(labels: list[str | None]) -> tuple[list[str | None], list[str] | None]:
    """Labels as numbers; names become numbers in sorted order, numbers stay what they are."""
    known = sorted({label for label in labels if label is not None})
    if all(label.isdigit() for label in known):
        return labels, None
    place = {name: str(number) for number, name in enumerate(known)}
    return [None if label is None else place[label] for label in labels], known


def open_delimited(
    path: str,
    *,
    image: str = "",
    text: str = "",
    audio: str = "",
    label: str = "",
    sep: str = "",
    quoting: str = "auto",
    root: str = "",
) -> Table:
    """Opens `csv:/x.tsv?image=filepath&text=title`; OpenCLIP's column names are the default.

    Without `sep` (tab, comma or semicolon) the header line decides: a tab in it means tabs.
    `quoting` on means that quotation marks enclose fields, off that they are text; auto is off with
    tabs, where captions often hold lone ones that would swallow the rows behind them.
    """
    if quoting not in ("auto", "on", "off"):
        raise ValueError(f"quoting={quoting!r} of {path} must be auto, on or off.")
    file = require(path, "The table")
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline()
        delimiter = _SEPARATORS.get(sep, sep) if sep else "\t" if "\t" in header else ","
        quoted = quoting == "on" or (quoting == "auto" and delimiter != "\t")
        style = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        csv.field_size_limit(1 << 24)
        rows = csv.DictReader(chain([header], lines), delimiter=delimiter, quoting=style)
        columns = [name for name in rows.fieldnames or [] if name]
        fields = _named_fields(columns, path, image=image, text=text, audio=audio, label=label)
        return table_of_rows(rows, fields, root or file.parent)


def open_jsonl(
    path: str,
    *,
    image: str = "",
    text: str = "",
    audio: str = "",
    label: str = "",
    root: str = "",
) -> Table:
    """Opens `jsonl:/manifest.jsonl?audio=audio_filepath&text=text`, one object a line."""
    file = require(path, "The manifest")
    rows = list(read_json_lines(file))
    columns = list(dict.fromkeys(key for row in rows[:1000] for key in row))
    fields = _named_fields(columns, path, image=image, text=text, audio=audio, label=label)
    return table_of_rows(rows, fields, root or file.parent)


_USUAL_NAMES = {
    "image": ("filepath", "image", "image_path", "file_name", "img"),
    "text": ("title", "text", "caption", "captions", "sentence"),
    "audio": ("audio_filepath", "audio", "audio_path", "path", "wav"),
    "label": ("label", "intent", "class"),
}


def _named_fields(columns: Sequence[str], path: str, **asked: str) -> dict[str, str]:
    """Field -> column: as asked, or by the usual names where nothing is asked."""
    fields = {}
    for field, name in asked.items():
        if name and name not in columns:
            close = difflib.get_close_matches(name, columns, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{path} has no column {name!r} (asked for as {field}=).{hint} Its columns: "
                f"{', '.join(columns)}."
            )
        usual = next((u for u in _USUAL_NAMES[field] if u in columns), "")
        if name or usual:
            fields[field] = name or usual
    if not fields:
        raise ValueError(
            f"None of the columns of {path} ({', '.join(columns)}) is known; name them with "
            "image=, text=, audio= or label=."
        )
    return fields


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a broken line gives an empty one, which is skipped when read."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                _LOG.warning("%s line %d is not a JSON object.", file, number)
                row = {}
            yield row


def open_folder(path: str, *, captions: bool = False) -> Table:
    """Opens a folder of pictures: `folder:/data/flowers`, one subfolder a class.

    With `captions`, the file `<name>.txt` beside each picture holds its captions, one a line.
    """
    root = require(path, "The folder of pictures")
    extensions = {"." + extension for extension in PARTS["image"]}
    rows = []
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        inside = Path(folder).relative_to(root)
        for name in sorted(names):
            file = inside / name
            if file.suffix.lower() not in extensions:
                continue
            label = inside.parts[0] if inside.parts else None
            rows.append({"image": str(file), "label": label})
            if captions:
                rows[-1]["text"] = _captions_beside(root / file)
    if not rows:
        raise FileNotFoundError(f"The folder {root} holds no pictures ({', '.join(extensions)}).")
    fields = {name: name for name in ("image", "label", "text") if any(r.get(name) for r in rows)}
    return table_of_rows(rows, fields, root)


def _captions_beside(image: Path) -> list[str] | None:
    beside = image.with_suffix(".txt")
    if not beside.exists():
        return None
    return [line for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
