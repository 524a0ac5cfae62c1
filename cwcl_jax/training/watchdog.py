"""A thread that ends a process whose work makes no progress.

A process that dies is noticed by jax's runtime. One that lives and does nothing (a file system that
hangs, a collective that one process never entered) is not, and holds the others forever. Each phase
of the work has a limit of time without progress. When the limit is exceeded, the stacks of all
threads are written and the process ends with exit code 43; jax then ends the other processes. All
processes of a job wait for the one that hangs, so their watchdogs end them nearly at once:
`run_main` lets each write its stacks before the first one leaves.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cwcl_jax.exit_codes import WATCHDOG
from cwcl_jax.progress import listening
from cwcl_jax.training.options import DistributedConfig

PHASES = ("startup", "first_step", "step", "evaluation", "saving", "embedding", "shutdown")


@dataclasses.dataclass
class _Phase:
    name: str
    detail: str
    since: float


class Watchdog:
    """Watches one phase at a time; phases can be nested.

    Args:
      limits: seconds without progress by phase; 0 or no entry for no limit.
      outputs: files with a descriptor, to which message and stacks are written.
      end: called with the exit code; does not return except in tests.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        *,
        outputs: Sequence[Any] | None = None,
        end: Callable[[int], Any] = os._exit,
        tick: float = 0.5,
    ):
        self._limits = dict(limits)
        self._outputs = outputs
        self._end = end
        self._tick = tick
        self._lock = threading.Lock()
        self._phases: list[_Phase] = []
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._listening = ExitStack()

    @classmethod
    def from_config(cls, config: DistributedConfig, **options: Any) -> Watchdog:
        """Returns a watchdog with the limits of the settings."""
        return cls({name: getattr(config, f"{name}_timeout") for name in PHASES}, **options)

    def __enter__(self) -> Watchdog:
        self._listening.enter_context(listening(self.beat))
        if any(self._limits.values()):
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening.close()
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Assigns the work inside to phase `name`; afterwards the outer phase's limit restarts."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is not one of {', '.join(PHASES)}")
        with self._lock:
            self._phases.append(_Phase(name, detail, time.monotonic()))
        try:
            yield
        finally:
            with self._lock:
                self._phases.pop()
                if self._phases:
                    self._phases[-1].since = time.monotonic()

    def beat(self, detail: str | None = None) -> None:
        """Reports progress: the limit of the current phase restarts."""
        with self._lock:
            if self._phases:
                phase = self._phases[-1]
                phase.since = time.monotonic()
                phase.detail = phase.detail if detail is None else detail

    def hold(self) -> None:
        """Returns at once, or never if the watchdog is about to end this process."""
        if self._ending.is_set():
            threading.Event().wait()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            self._forgive(now - last - self._tick)
            last = now
            message = self._overdue(now)
            if message:
                self._ending.set()
                self._report(message)
                self._end(WATCHDOG)
                return

    def _forgive(self, late: float) -> None:
        """Excludes time in which this process was frozen (SIGSTOP, a suspended machine)."""
        if late > 5.0:
            with self._lock:
                for phase in self._phases:
                    phase.since += late

    def _overdue(self, now: float) -> str:
        """Returns the message if the current phase exceeded its limit, else ""."""
        with self._lock:
            if not self._phases:
                return ""
            phase = self._phases[-1]
            limit, waited = self._limits.get(phase.name, 0), now - phase.since
            if not limit or waited <= limit:
                return ""
            return (
                f"watchdog: no progress for {waited:.0f} s in {phase.name}"
                f"{f' ({phase.detail})' if phase.detail else ''}; the limit is "
                f"config.distributed.{phase.name}_timeout={limit:g} (0: none). All stacks follow; "
                f"this process ends with exit code {WATCHDOG}."
            )

    def _report(self, message: str) -> None:
        outputs = [sys.stderr] if self._outputs is None else self._outputs
        for output in outputs:
            try:
                output.write(f"\n{message}\n")
                output.flush()
                faulthandler.dump_traceback(output, all_threads=True)
            # a full disk or a closed file must not keep the process alive
            except (OSError, ValueError):
                continue


def unwatched() -> Watchdog:
    """Returns a watchdog without limits, for callers that supervise themselves."""
    return Watchdog({})
