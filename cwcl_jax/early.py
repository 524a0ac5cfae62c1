"""Handles requests to stop that arrive before a run can save anything.

This module is imported before jax, whose import takes seconds. During this time a scheduler's
SIGTERM would end the process as if it had crashed, and a Ctrl-C could be lost in an import.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

PREEMPTED = 75


def leave_on_request() -> None:
    """Ends the process at SIGTERM or Ctrl-C with exit code 75, until a run handles both."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # Not an exception, which a running import might catch. There is nothing to clean up yet.
    os.write(2, b"\nstopped before training began; the same command begins it\n")
    os._exit(PREEMPTED)
