"""The real train step, compiled but not run: XLA's memory and traffic, and the largest batch."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from cwcl_jax.planning.collectives import Traffic, traffic
from cwcl_jax.planning.inputs import AbstractBatch
from cwcl_jax.training.state import Blueprint
from cwcl_jax.training.step import TrainStep

# Number of batches that a search for the largest one may compile besides the config's own.
_MOST_TRIES = 4
# A batch that needs this share of the limit is large enough.
_ENOUGH = 0.98
# Largest factor of a fitting batch that is tried.
_MOST = 64


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's figures for one device.

    Attributes:
      arguments: bytes of state, locked leaves and one batch.
      temporary: largest number of bytes that a step allocates in addition.
      traffic: collectives by kind.
      seconds: duration of lowering and compiling.
    """

    arguments: int
    temporary: int
    traffic: dict[str, Traffic]
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that the device sends in a step."""
        return sum(kind.sent_bytes for kind in self.traffic.values())


def compile_step(
    blueprint: Blueprint, batch: AbstractBatch, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compiles the step for the blueprint's mesh with compiler options; returns XLA's figures."""
    start = time.perf_counter()
    compiled = TrainStep(blueprint).lower(batch).compile(dict(options or {}))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        traffic=traffic(compiled.as_text()),
        seconds=seconds,
    )


def largest_batch(
    bytes_of: Callable[[int], float], start: int, need: float, *, step: int, limit: float
) -> int:
    """Returns the largest multiple of `step` that was found to fit, or 0 if none was.

    Memory is nearly linear in the batch: a line through two batches predicts a third, which is
    tried in turn, until one uses 98 % of the limit.

    Args:
      bytes_of: compiles a batch and returns the bytes it needs; infinite if the compiler refuses
          it.
      start: a batch size that is known to need `need` bytes.
      limit: bytes.
    """
    needs = {start: need}
    guess = start // 2 // step * step or 2 * start
    for _ in range(_MOST_TRIES):
        needs[guess] = bytes_of(guess)
        best = max((size for size in needs if needs[size] <= limit), default=0)
        too_large = min((size for size in needs if needs[size] > limit), default=_MOST * best)
        if best and needs[best] >= _ENOUGH * limit:
            break
        guess = min(max(_on_line(needs, step, limit), best + step), too_large - step)
        if guess in needs or guess < step:
            break
    return max((size for size in needs if needs[size] <= limit), default=0)


def _on_line(needs: Mapping[int, float], step: int, limit: float) -> int:
    """Returns where a line through the two batches nearest the limit meets it, slightly below."""
    finite = [size for size in needs if math.isfinite(needs[size])]
    if len(finite) < 2:
        return min(needs) // 2 // step * step
    low, high = sorted(sorted(finite, key=lambda size: abs(needs[size] - limit))[:2])
    slope = max((needs[high] - needs[low]) / (high - low), 1.0)
    return int(low + (0.995 * limit - needs[low]) / slope) // step * step
