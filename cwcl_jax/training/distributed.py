"""One process or many: who is primary, and when the run was asked to stop."""

from __future__ import annotations

import signal
from types import FrameType

import jax


def is_primary() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM and Ctrl-C as a request to save and stop; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether all processes should save after `step` and stop; call it at every step."""
        del step  # consecutive numbers matter once there are several processes
        return self._received
