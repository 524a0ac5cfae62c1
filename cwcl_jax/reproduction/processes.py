"""Runs a command in its own process and forwards stop signals to it, so that it can save."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from cwcl_jax import cli

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_process(command: Sequence[str], log: Path) -> int:
    """Runs a `python ...` command, appends its output to `log`, and returns its exit code.

    The first stop signal is forwarded as SIGTERM, at which a training run saves and ends; further
    signals are forwarded unchanged. This process waits for the command in both cases. Otherwise the
    command would continue to train next to the one that the next command starts.

    Raises:
      SystemExit: with exit code 75 if such a signal came, after the command has ended.
    """
    process: subprocess.Popen | None = None
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM if len(received) == 1 else number)

    with log.open("ab") as output, _handled_by(forward):
        # In its own process group, because a terminal's Ctrl-C goes to the whole group.
        process = subprocess.Popen(
            [sys.executable, *command[1:]], stdout=output, stderr=output, process_group=0
        )
        if received:  # the signal came before the process existed
            process.terminate()
        code = process.wait()
    if received:
        raise SystemExit(cli.PREEMPTED)
    return code


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Routes stop signals to `handler`, except those that are ignored (nohup)."""
    taken = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
