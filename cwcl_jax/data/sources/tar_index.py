"""Index of a tar: (offset, size) of every sample's parts, scanned once and stored.

A sample consists of the members that share a key: the name up to the first dot of its last part.
The use of a member is given by what follows that dot; if that is no known use (`7.seg.png`), by its
last part, unless the sample has a plain member of that kind (`7.png`). Names are only data here;
nothing is ever written to where a name points.

The scan reads headers, the small text members, and the last 512 bytes of every other one, which are
next to the following header: their checksum distinguishes a tar from another of the same size.
"""

import contextlib
import hashlib
import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cwcl_jax.copies import cache_home, local_copy
from cwcl_jax.files import is_hidden, replacing
from cwcl_jax.paths import StorePath, is_url, to_path
from cwcl_jax.progress import beat

_LOG = logging.getLogger(__name__)
_VERSION = 3  # 1: without a checksum; 2: with members of hidden folders
_BLOCK = 512
# Names must be short: the table's key column is as wide as the longest name.
_LONGEST_HEADER = 1 << 15
# One read of this size holds many headers of small members; a disk reads it faster than single
# headers (300 against 150 MB/s, cold).
_WINDOW = 1 << 19
# A request to an object store takes tens of milliseconds, in which this much can be transferred.
_STORE_WINDOW = 1 << 23
_SUFFIX = ".offsets"
# Use of a member by its extension; the first member of a kind in a sample is used.
PARTS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "text": ("txt", "text", "caption"),
    "json": ("json",),
    "cls": ("cls",),
    "audio": ("flac", "wav", "mp3", "ogg", "opus"),
}
_PART_OF = {extension: part for part, group in PARTS.items() for extension in group}
_WORDS = ("text", "json", "cls")
_Parts = dict[str, tuple[int, int]]  # offset and size by part


@dataclass(frozen=True)
class TarIndex:
    """Samples of one tar in order: `table` has a key, and an offset and a size for each part.

    A part that a sample lacks has size -1; parts that no sample has take no space. `checksum` is
    that of the members' names, sizes, times and ends. `surplus` counts the members that are not
    used because their sample has an equal one; `first_surplus` is the first one's name.
    """

    table: np.ndarray
    tar_size: int
    tar_mtime: int
    truncated: bool
    checksum: int
    surplus: int = 0
    first_surplus: str = ""

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int, part: str) -> tuple[int, int] | None:
        """Returns offset and size of a sample's part, None if it has none."""
        if f"{part}_size" not in (self.table.dtype.names or ()):
            return None
        record = self.table[row]
        size = int(record[f"{part}_size"])
        return None if size < 0 else (int(record[f"{part}_offset"]), size)

    def parts(self) -> set[str]:
        """Returns the parts that any sample has."""
        return {part for part in PARTS if f"{part}_size" in (self.table.dtype.names or ())}


def load_index(path: str, cache_dir: str = "") -> TarIndex:
    """Returns the index of a tar: the stored one if size and time match, else a new one."""
    beat()
    now = _size_and_time(path)
    for place in _places(path, cache_dir):
        index = _read(place)
        if index and (index.tar_size, index.tar_mtime) == now:
            return index
    index = build_index(path)
    for place in _places(path, cache_dir):
        with contextlib.suppress(OSError):
            _write(place, index)
            return index
    _LOG.warning("The index of %s could not be stored; set a writable cache folder.", path)
    return index


def _size_and_time(path: str) -> tuple[int, int]:
    """Returns size and modification time (ns) of a tar, or its version on a store as a number.

    Raises:
      ValueError: it is not a regular file.
    """
    place = to_path(path)
    if isinstance(place, StorePath):
        size, version = place.version()
        return size, int(version[:15], 16)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file, but tars are read at random offsets.")
    return status.st_size, status.st_mtime_ns


def _places(path: str, cache_dir: str) -> list[Path]:
    """Returns possible paths of an index: in `cache_dir`, or next to the tar and in the cache."""
    whole = path if is_url(path) else os.path.abspath(path)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:20]
    if cache_dir:
        return [cache_home(cache_dir) / (digest + _SUFFIX)]
    return [to_path(path + _SUFFIX), cache_home() / "tar_indexes" / (digest + _SUFFIX)]


# Fields of an index that are stored with its table.
_KEPT = ("tar_size", "tar_mtime", "truncated", "checksum", "surplus", "first_surplus")


def _write(place: Path, index: TarIndex) -> None:
    """Writes an index under another name and renames it, so that readers never see half a file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    present = index.parts()
    header = {
        "version": _VERSION,
        **{name: getattr(index, name) for name in _KEPT},
        "key_bytes": index.table.dtype["key"].itemsize,
        "parts": [part for part in PARTS if part in present],
        "samples": len(index.table),
    }
    with replacing(place) as partial, partial.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(index.table.tobytes())


def _read(place: Path) -> TarIndex | None:
    try:
        place = local_copy(place)
        with open(place, "rb") as file:
            header = json.loads(file.readline())
            if header["version"] != _VERSION:
                return None
            start, samples = file.tell(), header["samples"]
            dtype = _dtype(header["key_bytes"], header["parts"])
            if os.fstat(file.fileno()).st_size != start + samples * dtype.itemsize:
                return None
        # Mapped, not read: the indexes of tens of millions of samples need not stay in memory.
        table = np.empty(0, dtype)
        if samples:  # plain array: reading single rows of a memmap takes ten times as long
            table = np.asarray(np.memmap(place, dtype, "r", start, samples))
        return TarIndex(table, **{name: header[name] for name in _KEPT})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dtype(key_bytes: int, parts: Sequence[str]) -> np.dtype:
    columns = [(f"{part}_{kind}", "<i8") for part in parts for kind in ("offset", "size")]
    return np.dtype([("key", f"S{key_bytes}"), *columns])


def build_index(path: str) -> TarIndex:
    """Returns the index from a tar's headers; members that reach past its end are left out."""
    tar_size, tar_mtime = _size_and_time(path)
    # By key: parts named by the whole extension, and parts named only by its end.
    samples: dict[bytes, tuple[_Parts, _Parts]] = {}
    repeated: list[tuple[bytes, str, bool, bytes]] = []
    checksum, complete = 0, True
    with _window_of(path) as window:
        for name, offset, size, time in _members(window, tar_size, path):
            if name is None:
                complete = False
                break
            key, part, exact = _meaning(name)
            if part is None:
                continue
            length = size if part in _WORDS and size <= _WINDOW else min(size, _BLOCK)
            end = window.read(offset + size - length, length)
            checksum = zlib.crc32(b"%s\0%d\0%s\0%s" % (name, size, time, end), checksum)
            parts = samples.setdefault(key, ({}, {}))[not exact]
            if part in parts:
                repeated.append((key, part, exact, name))
            else:
                parts[part] = (offset, size)
    # Further pictures next to a plain one (masks, depth) are not counted as unused.
    surplus = [name for key, part, exact, name in repeated if exact or part not in samples[key][0]]
    return TarIndex(
        _table({key: loose | plain for key, (plain, loose) in samples.items()}),
        tar_size,
        tar_mtime,
        truncated=not complete,
        checksum=checksum,
        surplus=len(surplus),
        first_surplus=surplus[0].decode("utf-8", "replace") if surplus else "",
    )


def _meaning(name: bytes) -> tuple[bytes, str | None, bool]:
    """Returns key and part (None = unused) of a member; whether the whole extension names it."""
    folder, _, base = name.rpartition(b"/")
    stem, dot, ending = base.partition(b".")
    hidden = any(map(is_hidden, folder.decode("utf-8", "replace").strip("./").split("/")))
    if not dot or not stem or hidden:
        return b"", None, False
    extension = ending.decode("ascii", "replace").lower()
    part = _PART_OF.get(extension)
    key = folder + b"/" + stem if folder else stem
    return key, part or _PART_OF.get(extension.rpartition(".")[2]), part is not None


@contextlib.contextmanager
def _window_of(path: str) -> Iterator["_Window"]:
    place = to_path(path)
    if isinstance(place, StorePath):
        yield _Window(place.read_range, _STORE_WINDOW)
        return
    with open(path, "rb", buffering=0) as file:
        yield _Window(lambda start, size: os.pread(file.fileno(), size, start), _WINDOW)


class _Window:
    """Reads a file from beginning to end, in large pieces."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size = read, size
        self._data, self._start = b"", 0

    def read(self, start: int, size: int) -> bytes:
        inside = start - self._start
        if not 0 <= inside <= len(self._data) - size:
            self._data = self._read(start, max(size, self._size))
            beat()
            self._start, inside = start, 0
        return self._data[inside : inside + size]


def _table(samples: dict[bytes, _Parts]) -> np.ndarray:
    width = max((len(key) for key in samples), default=1)
    present = {part for parts in samples.values() for part in parts}
    columns = [part for part in PARTS if part in present]
    missing = (0, -1)
    rows = [
        (key, *(value for part in columns for value in parts.get(part, missing)))
        for key, parts in samples.items()
    ]
    return np.array(rows, _dtype(width, columns))


def _members(
    window: _Window, end: int, path: str
) -> Iterator[tuple[bytes | None, int, int, bytes]]:
    """Yields (name, offset, size, time) of regular files; (None, ...) if the tar is truncated.

    Raises:
      ValueError: it is not a tar, or a header is damaged.
    """
    position, name, size_override = 0, b"", -1
    while position + _BLOCK <= end:
        header = window.read(position, _BLOCK)
        if header[:1] == b"\0" and not header.strip(b"\0"):
            return
        if not _checksum_fits(header):
            if position == 0:
                raise ValueError(
                    f"{path} is not a tar file (compressed ones must be decompressed first: "
                    "members are read at their offsets)."
                )
            yield None, position, 0, b""
            return
        kind = header[156:157]
        size = size_override if size_override >= 0 else _number(header[124:136])
        start = position + _BLOCK
        if kind in b"Lx" and size > _LONGEST_HEADER:
            raise ValueError(f"{path}: a member's name or header has {size} bytes: damaged.")
        if start + size > end:
            yield None, start, size, b""
            return
        if kind in b"Lxg":
            body = window.read(start, size) if kind in b"Lx" else b""
            if kind == b"L":
                name = body.rstrip(b"\0")
            elif kind == b"x":
                name, size_override = _pax(body, name)
                if size_override < -1:
                    yield None, position, 0, b""
                    return
        else:
            if kind in (b"0", b"\0", b"7"):
                yield name or _plain_name(header), start, size, header[136:148]
            name, size_override = b"", -1
        position = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    # Two blocks of zeros end a tar; a file truncated at the end of a block has none.
    yield None, position, 0, b""


def _plain_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """Returns the value of octal digits or of the base-256 form; a huge number if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return 1 << 62


def _pax(body: bytes, name: bytes) -> tuple[bytes, int]:
    """Returns path and size (-1 = not given) of an extended header; size -2 if it is damaged.

    The header consists of records "length key=value" that end with a line break.
    """
    size, position = -1, 0
    while position < len(body):
        digits, blank, _ = body[position : position + 20].partition(b" ")
        if not blank or not digits.isdigit() or int(digits) <= len(digits):
            return name, -2
        record = body[position : position + int(digits)]
        key, _, value = record[len(digits) + 1 :].removesuffix(b"\n").partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size":
            size = int(value) if value.isdigit() else -2
        position += int(digits)
    return name, size


def _checksum_fits(header: bytes) -> bool:
    """Returns whether a header is undamaged: its checksum counts itself as blanks."""
    return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])
