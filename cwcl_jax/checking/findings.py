"""The result of a check, the time it may take, and the timing of a call."""

from __future__ import annotations

import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from cwcl_jax.planning.chips import Chip, chip_of

PASS, LOOK, FAIL = "PASS", "LOOK", "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
      verdict: PASS; LOOK, slower or less exact than expected, or not measured; FAIL, wrong.
      found: what was measured, in words.
      advice: what to do if the verdict is not PASS.
      values: the numbers, for the JSON file.
    """

    check: str
    verdict: str
    found: str
    advice: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how much to measure.

    Attributes:
      tiny: use sizes for two CPU cores, only to test that everything runs.
      until: value of `time.perf_counter()` after which no measurement begins.
    """

    tiny: bool
    until: float

    @property
    def device(self) -> Any:
        """The first of this process's devices."""
        return jax.local_devices()[0]

    @property
    def chip(self) -> Chip | None:
        """The device's data sheet, or None if it is not in the table."""
        return chip_of(self.device.device_kind)

    @property
    def is_gpu(self) -> bool:
        return self.device.platform == "gpu"

    def left(self) -> float:
        """Returns the seconds in which a measurement may still begin."""
        return self.until - time.perf_counter()


Check = Callable[[Machine], Iterator[Finding]]


def run_checks(machine: Machine, checks: Sequence[tuple[str, float, Check]]) -> Iterator[Finding]:
    """Yields all findings, also one for each exception, and one for each check without time left.

    Args:
      checks: name, approximate seconds, and function of each check.
    """
    for name, seconds, check in checks:
        if not machine.tiny and machine.left() < seconds:
            yield Finding(name, LOOK, "not measured: out of time", "more --seconds, or --only")
            continue
        try:
            yield from check(machine)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            yield Finding(
                name, FAIL, f"{type(error).__name__}: {lines[0][:200]}", "the traceback is above"
            )
            traceback.print_exception(error)


def seconds_of(call: Callable[[], Any], least: float = 0.3) -> float:
    """Returns the seconds of one call: the median of three rounds of several calls.

    Each round waits once, after its last call.
    """
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, min(50, int(least / 3 / max(time.perf_counter() - begin, 1e-6))))
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready([call() for _ in range(count)][-1])
        rounds.append((time.perf_counter() - begin) / count)
    return statistics.median(rounds)


def share_of(reached: float, peak: float | None) -> str:
    """Returns ` (62 % of the data sheet's)`, or "" if the peak is unknown."""
    return "" if peak is None else f" ({reached / peak:.0%} of the data sheet's)"


def table(findings: Sequence[Finding]) -> str:
    """Returns the findings as text: verdict, check, what was found, and advice below."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict}  {finding.check:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<{width + 8}}-> {finding.advice}")
    count = {v: sum(f.verdict == v for f in findings) for v in (PASS, LOOK, FAIL)}
    return "\n".join(lines) + "\n" + ", ".join(f"{n} {v}" for v, n in count.items())
