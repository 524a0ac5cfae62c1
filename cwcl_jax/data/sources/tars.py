"""Random access to tars of img2dataset and webdataset, and to CLIP_benchmark's folders of tars."""

import functools
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import NO_CLASSES, Example, Source, fingerprint_of
from cwcl_jax.data.sources.files import expand_pattern, require
from cwcl_jax.data.sources.tar_index import TarIndex, load_index
from cwcl_jax.data.sources.texts import captions_of, lines_of, text_of_bytes
from cwcl_jax.files import matching, parse_json
from cwcl_jax.paths import StoreError, StorePath, is_url, to_path

_LOG = logging.getLogger(__name__)
# Number of open descriptors; systems allow a process about a thousand by default.
_OPEN_FILES = 200
_SECONDS_BETWEEN_NEWS = 20
# Up to this many unused bytes between a sample's parts, one request is better than two.
_GAP = 1 << 18
# Number of samples whose JSON is read to list the fields.
_JSON_LOOKED_AT = 32


class _OpenFile:
    """A descriptor that stays open as long as this object is referenced, even after eviction."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(_OPEN_FILES)
def _open_file(path: str, size: int, mtime: int) -> _OpenFile:
    del size, mtime  # part of the key, so that a replaced file is opened anew
    return _OpenFile(path)


class Tars(Source):
    """Samples of several tars in sequence.

    `text` is the origin of captions: "txt" (the text member), "lines" (its lines, one caption each)
    or "json:FIELD" (a field of the JSON member, a string or a list of strings).
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        text: str = "txt",
        cache_dir: str = "",
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = (),
    ):
        if text not in ("txt", "lines") and not text.startswith("json:"):
            raise ValueError(f"text={text!r} of a tar source must be txt, lines or json:FIELD.")
        self.paths = list(paths)
        self.text = text
        self.templates = templates
        self._class_names = class_names
        self._indexes = _load_indexes(self.paths, cache_dir)
        self.starts = [0, *accumulate(len(index) for index in self._indexes)]
        self._parts = {part for index in self._indexes for part in index.parts()}
        if len(self) and text.startswith("json:"):
            self._check_json_field(text.removeprefix("json:"))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        lacks = {
            part: f"has no {part}: its samples have {', '.join(sorted(self._parts)) or 'nothing'}"
            for part in ("image", "audio")
            if part not in self._parts
        }
        if "cls" not in self._parts:
            lacks["label"] = NO_CLASSES
        if "text" not in self._parts and not self.text.startswith("json:"):
            fields = ", ".join(self._json_fields())
            lacks["text"] = "has no .txt members" + (
                f"; choose a field of its JSON members ({fields}) with text=json:FIELD"
                if fields
                else ", and no JSON members either"
            )
        return lacks

    def _check_json_field(self, field: str) -> None:
        """Raises ValueError if no sample can have the field from which captions are read."""
        if "json" not in self._parts:
            raise ValueError(
                f"text=json:{field}, but the samples of {self.paths[0]} have no JSON members; they "
                f"have {', '.join(sorted(self._parts))}. Use text=txt or text=lines."
            )
        fields = self._json_fields()
        if fields and field not in fields:
            raise ValueError(
                f"text=json:{field}, but the JSON members of {self.paths[0]} have no field "
                f"{field!r}. They have: {', '.join(fields)}."
            )

    def _json_fields(self) -> list[str]:
        """Returns the fields of the JSON members of some samples, spread over all tars."""
        found: dict[str, None] = {}
        for index in np.unique(np.linspace(0, len(self) - 1, _JSON_LOOKED_AT).astype(int)):
            try:
                data = self._part(*self._place(int(index)), "json")
                found |= dict.fromkeys(_json_object(data)) if data is not None else {}
            except BadExample:
                continue
        return list(found)

    def _place(self, index: int) -> tuple[int, int]:
        """Returns tar and row of an example."""
        tar = bisect_right(self.starts, index) - 1
        return tar, index - self.starts[tar]

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int, fields: Collection[str]) -> Example:
        tar, row = self._place(index)
        ahead = self._together(tar, row, fields)
        key = bytes(self._indexes[tar].table["key"][row]).decode("utf-8", "replace")
        example: Example = {"id": f"{os.path.basename(self.paths[tar])}/{key}"}
        for field in ("image", "audio"):
            data = self._part(tar, row, field, ahead) if field in fields else None
            if data is not None:
                example[field] = data
        if "text" in fields:
            self._add_text(example, tar, row, ahead)
        label = self._part(tar, row, "cls", ahead) if "label" in fields else None
        if label is not None:
            example["label"] = _label_of(label)
        return example

    def _together(self, tar: int, row: int, fields: Collection[str]) -> tuple[int, bytes]:
        """Returns offset and bytes that cover the requested parts; (0, b"") unless on a store.

        If the parts are too far apart, it also returns (0, b""), and they are read one by one.
        """
        if not is_url(self.paths[tar]):
            return 0, b""
        text = "json" if self.text.startswith("json:") else "text"
        asked = {"image": "image", "audio": "audio", "text": text, "label": "cls"}
        index = self._indexes[tar]
        found = [index.place(row, part) for field, part in asked.items() if field in fields]
        places = [place for place in found if place is not None]
        start = min((offset for offset, _ in places), default=0)
        end = max((offset + size for offset, size in places), default=0)
        if end - start - sum(size for _, size in places) > _GAP:
            return 0, b""
        return start, self._bytes(tar, start, end - start)

    def _part(
        self, tar: int, row: int, part: str, ahead: tuple[int, bytes] = (0, b"")
    ) -> bytes | None:
        """Returns a member of a sample, from `ahead` if that contains it; None if there is none."""
        place = self._indexes[tar].place(row, part)
        if place is None:
            return None
        offset, size = place
        inside = offset - ahead[0]
        if ahead[1] and 0 <= inside <= len(ahead[1]) - size:
            return ahead[1][inside : inside + size]
        return self._bytes(tar, offset, size)

    def _bytes(self, tar: int, offset: int, size: int) -> bytes:
        index, path = self._indexes[tar], to_path(self.paths[tar])
        try:
            if isinstance(path, StorePath):
                data = path.read_range(offset, size)
            else:
                file = _open_file(self.paths[tar], index.tar_size, index.tar_mtime)
                data = os.pread(file.descriptor, size, offset)
        except StoreError:  # the examples that a run sees must not depend on the store
            raise
        except (OSError, ValueError) as error:
            raise BadExample("file unreadable", f"{self.paths[tar]}: {error}") from error
        if len(data) != size:
            raise BadExample("tar truncated", f"{self.paths[tar]} at {offset}")
        return data

    def _add_text(self, example: Example, tar: int, row: int, ahead: tuple[int, bytes]) -> None:
        part = "json" if self.text.startswith("json:") else "text"
        data = self._part(tar, row, part, ahead)
        if data is None:
            return
        if part == "json":
            text = captions_of(_json_object(data).get(self.text.removeprefix("json:")))
        else:
            text = text_of_bytes(data)
            text = lines_of(text) if self.text == "lines" else text
        if text is not None:
            example["text"] = text

    def fingerprint(self) -> str:
        parts = [(os.path.basename(p), len(i), i.tar_size, i.checksum) for p, i in self._pairs()]
        return fingerprint_of("tars", self.text, parts)

    def _pairs(self) -> list[tuple[str, TarIndex]]:
        return list(zip(self.paths, self._indexes, strict=True))


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise BadExample("json unreadable", str(error)) from error
    if not isinstance(value, dict):
        raise BadExample("json unreadable", f"a {type(value).__name__} instead of an object")
    return value


def _label_of(data: bytes) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise BadExample("label unreadable", repr(data[:20])) from error


def _load_indexes(paths: Sequence[str], cache_dir: str) -> list[TarIndex]:
    with ThreadPoolExecutor(16) as pool:
        there = list(pool.map(lambda path: to_path(path).exists(), paths))
    missing = [path for path, found in zip(paths, there, strict=True) if not found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} tars do not exist, first {missing[0]}. Correct the "
            "pattern in the source line."
        )
    indexes, told = [], time.monotonic()
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for index in pool.map(lambda path: load_index(path, cache_dir), paths):
            indexes.append(index)
            if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
                told = time.monotonic()
                _LOG.warning("Indexing tars, once: %d of %d.", len(indexes), len(paths))
    _warn_of_losses(paths, indexes)
    return indexes


def _warn_of_losses(paths: Sequence[str], indexes: Sequence[TarIndex]) -> None:
    """Logs what is not read of the tars, at every opening and not only while indexing."""
    pairs = list(zip(paths, indexes, strict=True))
    truncated = [(path, len(index)) for path, index in pairs if index.truncated]
    if truncated:
        _LOG.warning(
            "%d of %d tars are truncated, their last samples are lost; first %s (%d remain).",
            *(len(truncated), len(paths), *truncated[0]),
        )
    surplus = [(path, index.first_surplus) for path, index in pairs if index.surplus]
    if surplus:
        _LOG.warning(
            "%d members of %d tars are not used, first %s in %s: names that are equal up to the "
            "first dot are one sample, and it already has one of that kind.",
            *(sum(index.surplus for index in indexes), len(surplus), *reversed(surplus[0])),
        )


def open_tars(path: str, *, text: str = "txt", cache_dir: str = "") -> Tars:
    """Opens `tars:/data/{00000..01242}.tar?text=json:caption`; a folder means all its tars."""
    if to_path(path).is_dir():
        paths = [str(tar) for tar in matching(to_path(path), "*.tar")]
        if not paths:
            raise FileNotFoundError(f"The folder {path} holds no .tar files.")
    else:
        paths = expand_pattern(path)
    return Tars(paths, text=text, cache_dir=cache_dir)


def open_clip_benchmark(path: str, *, split: str = "test", cache_dir: str = "") -> Tars:
    """Opens a data set in CLIP_benchmark's layout: `clip_benchmark:/data/cifar10?split=test`."""
    folder = require(to_path(path) / split, "The split's folder of a CLIP_benchmark data set")
    count = require(folder / "nshards.txt", "The number of shards")
    try:
        shards = int(count.read_text())
    except ValueError as error:
        raise ValueError(f"{count} must hold one number.") from error
    names = _lines_if_there(to_path(path) / "classnames.txt")
    templates = _lines_if_there(to_path(path) / "zeroshot_classification_templates.txt") or ()
    paths = [str(folder / f"{number}.tar") for number in range(shards)]
    return Tars(paths, text="lines", cache_dir=cache_dir, class_names=names, templates=templates)


def _lines_if_there(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    return lines_of(path.read_text(encoding="utf-8-sig"))
