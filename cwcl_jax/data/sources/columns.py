"""Columns of strings for millions of rows: one block of bytes and offsets, not Python objects."""

from collections.abc import Iterable

import numpy as np


class StringColumn:
    """An immutable list of strings; None is kept apart from the empty string."""

    def __init__(self, values: Iterable[str | None]):
        pieces, ends, missing = [], [0], []
        total = 0
        for row, value in enumerate(values):
            if value is None:
                missing.append(row)
            else:
                data = value.encode("utf-8", "surrogateescape")
                pieces.append(data)
                total += len(data)
            ends.append(total)
        self._data = b"".join(pieces)
        self._ends = np.array(ends, np.int64)
        self._missing = frozenset(missing)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str | None:
        if row in self._missing:
            return None
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        return self._data[start:end].decode("utf-8", "surrogateescape")

    def digest_parts(self) -> tuple[int, int]:
        """Number of rows and a checksum of the text, for fingerprints."""
        import zlib

        return len(self), zlib.crc32(self._data, zlib.crc32(self._ends.tobytes()))
