"""Reports progress of long work to listeners.

Code that synthesises sentences or reads the headers of tars calls `beat` and does not depend on the
watchdog that listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Reports that some work was done; from any thread."""
    for listener in tuple(_listeners):
        listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Calls `listener` at each beat."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
