"""Random access to rows of Parquet files: row groups are decoded whole and cached."""

import itertools
import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.arrow_files import contents_of
from cwcl_jax.paths import StoreError, StorePath

_LOG = logging.getLogger(__name__)
_MEBI = 1 << 20


class RowGroups:
    """The rows of several Parquet files in sequence.

    Only the requested columns are decoded. Decoded row groups of up to `memory_mib` MiB in total
    stay in memory; the least recently used are evicted first.

    Raises:
      ValueError: a file is damaged or not a Parquet file.
    """

    def __init__(self, paths: Sequence[Path], memory_mib: int):
        self.paths = list(paths)
        self._memory_mib = memory_mib
        with ThreadPoolExecutor(8) as pool:
            self._footers = list(pool.map(_footer, self.paths))
        # (file, row group in it); `_starts` holds the first row of each.
        self._places = [
            (file, group)
            for file, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        sizes = [self._footers[f].row_group(g).num_rows for f, g in self._places]
        self._starts = [0, *itertools.accumulate(sizes)]
        counts = [footer.num_rows for footer in self._footers]
        self._file_starts = [0, *itertools.accumulate(counts)]
        self._kept = _KeptTables(memory_mib * _MEBI)

    def schemas(self) -> list[pa.Schema]:
        """Returns the columns of every file."""
        return [footer.schema.to_arrow_schema() for footer in self._footers]

    def __len__(self) -> int:
        return self._starts[-1]

    def cells(self, index: int, tops: Sequence[str]) -> Mapping[str, pa.Scalar]:
        number = bisect_right(self._starts, index) - 1
        try:
            table = self._kept.get((number, *tops), lambda: self._decode(number, tops))
        except StoreError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise BadExample("parquet unreadable", f"{self.name_of(index)}: {error}") from error
        row = index - self._starts[number]
        return {top: table.column(top)[row] for top in tops}

    def _decode(self, number: int, tops: Sequence[str]) -> pa.Table:
        file, group = self._places[number]
        # Every call has its own reader, because a reader must not be shared by threads.
        with (
            _readable(self.paths[file]) as handle,
            pq.ParquetFile(handle, metadata=self._footers[file]) as opened,
        ):
            return opened.read_row_group(group, columns=list(tops), use_threads=False)

    def tables(self, file: int, tops: Sequence[str]) -> Iterator[pa.Table]:
        """Yields the row groups of one file in order; none of them is cached."""
        for number, (where, _) in enumerate(self._places):
            if where == file:
                yield self._decode(number, tops)

    def name_of(self, index: int) -> str:
        file = bisect_right(self._file_starts, index) - 1
        return f"{self.paths[file].name}/{index - self._file_starts[file]}"

    def column(self, top: str) -> Iterator[pa.Array]:
        for number in range(len(self._places)):
            try:
                yield from self._decode(number, [top]).column(top).chunks
            except (pa.ArrowException, OSError) as error:
                path = self.paths[self._places[number][0]]
                raise ValueError(f"The column {top!r} of {path} cannot be read: {error}") from error

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def content(self) -> object:
        return contents_of(self.paths, ends=True)

    def __reduce__(self):
        return RowGroups, (self.paths, self._memory_mib)


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    """Yields what pyarrow can read ranges of: the path, or an opened object of a store."""
    if not isinstance(path, StorePath):
        yield path
        return
    with path.open("rb", buffering=0) as opened:
        yield opened


def _footer(path: Path) -> pq.FileMetaData:
    try:
        with _readable(path) as handle:
            return pq.read_metadata(handle)
    except StoreError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file: {error}") from error


class _KeptTables:
    """Decoded tables by key, up to a number of bytes; one thread decodes, others wait for it."""

    def __init__(self, limit: int):
        self._limit = limit
        self._tables: OrderedDict[Any, pa.Table] = OrderedDict()
        self._bytes = 0
        self._told = False
        self._running: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, decode: Any) -> pa.Table:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            mine = self._running.setdefault(key, threading.Lock())
        with mine:
            with self._lock:
                if key in self._tables:
                    return self._tables[key]
            try:
                table = decode()
                # Stored before the key is released, otherwise another thread could decode it again.
                self._keep(key, table)
            finally:
                with self._lock:
                    self._running.pop(key, None)
            return table

    def _keep(self, key: Any, table: pa.Table) -> None:
        with self._lock:
            if key in self._tables:
                return
            self._tables[key] = table
            self._bytes += table.nbytes
            if self._bytes > self._limit and not self._told:
                self._told = True
                _LOG.warning(
                    "Row groups of some %d rows and %.0f MB do not all fit in memory_mib=%d, so "
                    "random reads decode them again and again. Set keep=auto in the source line "
                    "(they are unpacked once), write smaller ones (row_group_size=100 or less), or "
                    "raise memory_mib.",
                    *(table.num_rows, table.nbytes / 1e6, self._limit // _MEBI),
                )
            while self._bytes > self._limit and len(self._tables) > 1:
                _, old = self._tables.popitem(last=False)
                self._bytes -= old.nbytes
