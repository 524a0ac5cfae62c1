"""Examples that cannot be used: one exception for all of them, counted by kind, with a limit."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

_LOG = logging.getLogger(__name__)
_NAMED_PER_KIND = 5
# A share of few examples says little: up to this many skipped examples nothing is refused.
ALWAYS_ALLOWED = 10


class BadExample(Exception):
    """An example that is unusable through no fault of the program; it is skipped and counted.

    `kind` is one of a few stable phrases ("image unreadable", "text empty", "file missing", ...).
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class TooManyBadExamples(RuntimeError):
    """The share of unusable examples exceeded `data.max_skipped_share`."""


class SkipCounter:
    """Counts examples read and skipped, over threads; logs the first few of each kind.

    An example that is read again in a later epoch is not counted again.

    Args:
      max_share: largest share of the examples read so far that may be unusable.
      length: number of examples in total; 0 if each is read only once.
    """

    def __init__(self, max_share: float, length: int = 0):
        self.max_share = max_share
        self.length = length
        self.read = self.tokens_cut = 0
        self._known: set[int] = set()
        self._kinds: Counter[str] = Counter()
        self._refusal: str | None = None
        self._lock = threading.Lock()

    @property
    def kinds(self) -> Mapping[str, int]:
        """Number of skipped examples by kind (a snapshot)."""
        with self._lock:
            return MappingProxyType(dict(self._kinds))

    @property
    def total(self) -> int:
        """Number of skipped examples."""
        with self._lock:
            return self._kinds.total()

    def add_read(self, count: int) -> None:
        """Counts usable examples."""
        with self._lock:
            self.read += count

    def add_cut(self, tokens: int) -> None:
        """Counts truncated tokens of usable examples, each time they are truncated."""
        with self._lock:
            self.tokens_cut += tokens

    def add_skipped(self, name: str, error: BadExample, index: int | None = None) -> None:
        """Counts and logs one skipped example; raises if the share exceeds the limit.

        After it has raised once, it raises the same message in every thread: which thread's error
        is shown is random, so the messages must not differ.
        """
        with self._lock:
            if index is not None and index in self._known and self._refusal is None:
                return
            if index is not None:
                self._known.add(index)
            self._kinds[error.kind] += 1
            of_kind, skipped = self._kinds[error.kind], self._kinds.total()
            seen = min(self.read + skipped, self.length or self.read + skipped)
            if self._refusal is None and skipped > max(ALWAYS_ALLOWED, self.max_share * seen):
                self._refusal = (
                    f"{skipped} of the {seen} examples read so far were unusable "
                    f"({summary(self._kinds)}; last: {name}: {error}), a larger share than "
                    f"data.max_skipped_share={self.max_share}. Repair the data, or raise this "
                    "limit."
                )
            refusal = self._refusal
        if of_kind <= _NAMED_PER_KIND:
            more = " (further ones of this kind are only counted)"
            _LOG.warning(
                "Skipped %s: %s%s", name, error, more if of_kind == _NAMED_PER_KIND else ""
            )
        if refusal is not None:
            raise TooManyBadExamples(refusal) from error


def summary(kinds: Mapping[str, int]) -> str:
    """Returns the kinds with their numbers, as text for users."""
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
