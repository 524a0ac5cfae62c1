"""Columns of strings for millions of rows: one block of bytes and offsets, not Python objects."""

import zlib
from array import array
from collections.abc import Iterable


class StringColumn:
    """A list of strings that only grows; None is distinct from the empty string.

    Bytes of file names that are invalid UTF-8 (`surrogateescape`) survive; other lone surrogates,
    which have no meaning, become "?".
    """

    def __init__(self, values: Iterable[str | None] = ()):
        self._data = bytearray()
        self._ends = array("q", [0])
        self._missing: set[int] = set()
        for value in values:
            self.append(value)

    def append(self, value: str | None) -> None:
        """Appends a row."""
        if value is None:
            self._missing.add(len(self))
        else:
            self._data += _encoded(value)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str | None:
        if row in self._missing:
            return None
        return self._data[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogateescape")

    def digest_parts(self) -> tuple[int, int]:
        """Returns the number of rows and a checksum of the text, for fingerprints."""
        return len(self), zlib.crc32(self._data, zlib.crc32(self._ends))


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")
