"""Requests to save and stop: SIGTERM from a scheduler, Ctrl-C from the user."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from cwcl_jax.training import coordination


class Stopped(Exception):
    """Work was interrupted because a stop was requested."""


class _Request:
    """Remembers that SIGTERM or Ctrl-C was received; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Any:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set in Python, here jax's, cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # print() is not safe in a signal handler
                os.write(2, b"\nsaving and stopping; Ctrl-C again ends at once\n")
        self._received = True


class StopSignal(_Request):
    """A request to stop that all processes see at the same call of `requested`.

    With several processes, jax's runtime receives SIGTERM and agrees on the call; Ctrl-C is not
    handled then, because launchers turn it into SIGTERM.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __enter__(self) -> Any:
        return super().__enter__() if jax.process_count() == 1 else self

    def request(self) -> None:
        """Asks all processes to save and stop, like a scheduler."""
        signal.raise_signal(signal.SIGTERM)

    def requested(self) -> bool:
        """Returns whether to save and stop now; all processes must call it equally often."""
        if jax.process_count() == 1:
            return self._received
        # jax agrees on a call number, the largest so far plus one, so numbers must be consecutive.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def noticed(self) -> bool:
        """Returns whether any process was asked to stop; each may call it at any time.

        Processes see it at different times, so they must agree afterwards on what they leave.
        """
        return self._received or coordination.preemption_is_noticed()


class IndependentStop(_Request):
    """A request to stop for processes that work at their own pace; it reaches all of them soon.

    It handles SIGTERM instead of jax's runtime, whose agreement needs equal numbers of calls.
    """

    def requested(self) -> bool:
        """Returns whether this process should stop."""
        if self._received:
            coordination.set_flag("stop")
        return self._received or coordination.flag_is_set("stop")
