"""Performance on the devices: seconds per step, utilisation, memory, and a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.config import ExperimentConfig, profiled_steps
from cwcl_jax.data.options import BESIDE
from cwcl_jax.planning.chips import Chip, chip_of
from cwcl_jax.planning.work import Work, count_work
from cwcl_jax.training.state import Blueprint, make_blueprint
from cwcl_jax.training.step import GradientFunction


def model_work(blueprint: Blueprint, batch: Any) -> Work:
    """Returns the matrix products of one step on one device, each counted once (no recomputation).

    Args:
      batch: the global batch, or its shapes.
    """
    towers = {
        name: dataclasses.replace(tower, remat="none")
        for name, tower in blueprint.config.towers.items()
    }
    config = dataclasses.replace(blueprint.config, accumulation_steps=1, towers=towers)
    plain = make_blueprint(config, blueprint.mesh)
    inputs = {name: batch[name] for name in (*config.towers, *BESIDE) if name in batch}
    arguments = (
        plain.abstract_params,
        plain.abstract_locked | plain.abstract_state().statistics,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return count_work(GradientFunction(plain), *arguments, devices=plain.mesh.size)


def peak_memory(devices: Sequence[Any]) -> float | None:
    """Returns the peak memory of any of the devices in bytes; None if it is not counted."""
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((float(count) for count in counts if count is not None), default=None)


class Meter:
    """Performance of this process's devices, for the log line and the metrics.

    Args:
      chip: the kind of devices; None if their peak is unknown.
      work: returns the flops of a step on one device for a batch; called only with a chip.
    """

    def __init__(
        self, devices: Sequence[Any], chip: Chip | None, work: Callable[[Any], float]
    ) -> None:
        self._devices = devices
        self._chip = chip
        self._work = work
        self._flops: float | None = None

    @classmethod
    def of(cls, blueprint: Blueprint) -> Meter:
        """Returns the meter of a run."""
        devices = jax.local_devices()

        def work(batch: Any) -> float:
            return model_work(blueprint, batch).total_flops

        return cls(devices, chip_of(devices[0].device_kind), work)

    def prepare(self, batch: Any) -> None:
        """Counts the work of a step with such a batch; takes as long as tracing the step."""
        if self._chip is not None:
            self._flops = self._work(batch)

    def read(self, seconds: float) -> dict[str, float]:
        """Returns `mfu`, model flops as a share of the chip's bfloat16 peak, and `memory_gb`.

        Args:
          seconds: duration of a step.
        """
        values = {}
        if self._chip is not None and self._flops is not None:
            values["mfu"] = self._flops / seconds / self._chip.half
        memory = peak_memory(self._devices)
        return values if memory is None else values | {"memory_gb": memory / 1e9}


class Profiler:
    """Writes a trace of some steps into a folder, for TensorBoard, XProf or Perfetto.

    Process 0 traces its own devices.
    """

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        self._steps = profiled_steps(config) if jax.process_index() == 0 else None
        self._folder = folder
        self._running = False

    def at(self, done: int, pending: Any) -> None:
        """Starts or ends the trace after `done` steps, once pending work is finished."""
        if self._steps is None:
            return
        first, count = self._steps
        if done == first and not self._running:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        elif done >= first + count:
            self.end(pending)

    def end(self, pending: Any = None) -> None:
        """Writes a trace that is still open."""
        if self._running:
            jax.block_until_ready(pending)
            self._running = False
            jax.profiler.stop_trace()
