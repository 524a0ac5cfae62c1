"""Progress of work that takes long, told to whoever watches over it.

What speaks sentences or reads the headers of tars calls `beat` and knows nothing of a watchdog,
which listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Tells that something was done; from any thread."""
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
