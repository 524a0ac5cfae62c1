"""Requests to stop that come before a run can save anything.

Imported before jax, whose import takes seconds: a scheduler's SIGTERM in this time would end the
process as if it had crashed, and a Ctrl-C could vanish in an import.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

PREEMPTED = 75


def leave_on_request() -> None:
    """Ends the process at SIGTERM or Ctrl-C with exit code 75, until a run takes both over."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # No exception: what is being imported might catch it. There is nothing to clean up yet.
    os.write(2, b"\nstopped before training began; the same command begins it\n")
    os._exit(PREEMPTED)
