"""Random access to Arrow streams, memory-mapped: saved by `datasets`, or unpacked from Parquet."""

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from cwcl_jax.paths import StorePath

_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# Number and size of the windows of a set of files that are compared to detect changes.
_WINDOWS, _WINDOW = 256, 4096


class ArrowFiles:
    """Record batches of several stream files in sequence.

    Raises:
      ValueError: a file is damaged or truncated, or its columns differ from the first file's.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._batches: list[pa.RecordBatch] = []
        self._names: list[tuple[str, int]] = []
        self.schema = pa.schema([])
        for number, path in enumerate(self.paths):
            batches, schema = _open_stream(path)
            if number and not schema.equals(self.schema):
                raise ValueError(
                    f"The columns of {path} are not those of {self.paths[0]}: "
                    f"{schema.remove_metadata()} and {self.schema.remove_metadata()}."
                )
            self.schema = schema if not number else self.schema
            first = sum(batch.num_rows for batch in self._batches)
            self._batches += batches
            self._names += [(path.name, first)] * len(batches)
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self._place = {name: place for place, name in enumerate(self.schema.names)}

    def __len__(self) -> int:
        return self._starts[-1]

    def cells(self, index: int, tops: Sequence[str]) -> Mapping[str, pa.Scalar]:
        number = bisect_right(self._starts, index) - 1
        batch, row = self._batches[number], index - self._starts[number]
        return {top: batch.column(self._place[top])[row] for top in tops}

    def name_of(self, index: int) -> str:
        name, first = self._names[bisect_right(self._starts, index) - 1]
        return f"{name}/{index - first}"

    def column(self, top: str) -> Iterator[pa.Array]:
        for batch in self._batches:
            yield batch.column(self._place[top])

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def content(self) -> object:
        return contents_of(self.paths)

    def __reduce__(self):
        return ArrowFiles, (self.paths,)


def _open_stream(path: Path) -> tuple[list[pa.RecordBatch], pa.Schema]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END)))
            if file.read() != _END:
                # A stream without its end would be read as if it had fewer rows.
                raise pa.ArrowInvalid("the end of the file is missing")
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        batches = list(reader)
        for batch in batches:
            batch.validate()
        return batches, reader.schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Write or copy it again.") from error


def contents_of(paths: Sequence[Path], ends: bool = False) -> list[tuple[str, int, int]]:
    """Returns name, size and a checksum of windows of every file.

    With `ends` the checksum includes the last bytes, as many as Parquet's own count before its last
    four bytes says.
    """
    windows = max(2, _WINDOWS // max(1, len(paths)))
    return [_content_of(path, windows, ends) for path in paths]


def _content_of(path: Path, windows: int, ends: bool) -> tuple[str, int, int]:
    if isinstance(path, StorePath):  # the object's version identifies its content in one request
        size, version = path.version()
        return path.name, size, int(version[:8], 16)
    size, total = path.stat().st_size, 0
    places = np.linspace(0, max(0, size - _WINDOW), windows).astype(np.int64)
    with open(path, "rb") as file:
        for place in np.unique(places).tolist():
            total = zlib.crc32(os.pread(file.fileno(), _WINDOW, place), total)
        if ends:
            footer = int.from_bytes(os.pread(file.fileno(), 4, size - 8), "little")
            total = zlib.crc32(os.pread(file.fileno(), footer, size - 8 - footer), total)
    return path.name, size, total
