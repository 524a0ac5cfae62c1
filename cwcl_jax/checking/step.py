"""Checks one step of a job on this machine: memory, time, and bitwise reproducibility."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cwcl_jax.checking.findings import FAIL, LOOK, PASS, Finding, Machine
from cwcl_jax.config import ExperimentConfig, defaults, from_config_dict
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.planning.estimate import USABLE_MEMORY, Estimate, step_work
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.training import sharding
from cwcl_jax.training.meter import model_work, peak_memory
from cwcl_jax.training.state import Blueprint, initialise, make_blueprint
from cwcl_jax.training.step import TrainStep

_STEPS = 6
# A step that takes more than this many times the roofline's seconds is worth a look.
_SLOW = 3.0


def paper_shapes(tiny: bool) -> ExperimentConfig:
    """Returns the paper's image-text job with random weights: ViT-L/16 locked, a text tower B.

    It has 8,192 pairs for each device of the job, twice the paper's.
    """
    batch = 8192 * jax.device_count()
    config = defaults(name="check", total_steps=100, global_batch_size=batch, embed_dim=1024)
    config.dtype, config.accumulation_steps, config.data.train = "bfloat16", 4, "scenes:train"
    config.data.image.size, config.data.text.max_tokens = 224, 77
    config.towers.image = defaults(
        TowerConfig, encoder="vit", preset="ViT-L/16", tune="none", scan_layers=True
    )
    config.towers.text = defaults(
        TowerConfig, encoder="text", preset="B", overrides={"vocab_size": 30_522}, scan_layers=True
    )
    if tiny:
        batch = 16
        config.global_batch_size, config.embed_dim, config.accumulation_steps = batch, 32, 1
        config.data.image.size, config.data.text.max_tokens = 32, 15
        small = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
        small = {"preset": "tiny", "scan_layers": False, "overrides": small}
        config.towers.image.update(small | {"overrides": small["overrides"] | {"image_size": 32}})
        config.towers.text.update(small)
    return from_config_dict(config)


def noise(batch: Any) -> Any:
    """Returns this process's rows of random, valid arrays that are shaped like a batch.

    Integer arrays with one number per row are lengths, which are set to the maximum.
    """
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> np.ndarray:
        shape = (leaf.shape[0] // jax.process_count(), *leaf.shape[1:])
        if leaf.dtype == bool:
            return np.ones(shape, bool)
        if not np.issubdtype(leaf.dtype, np.integer):
            return rng.standard_normal(shape, np.float32).astype(leaf.dtype)
        if len(shape) == 1:
            return np.full(shape, 2**30, leaf.dtype)
        return rng.integers(0, 250, shape).astype(leaf.dtype)

    return jax.tree.map(fill, batch)


class StepCheck:
    """Measures the step of a config once, and judges it in several ways.

    Attributes:
      pairs_per_second: the measured rate; 0.0 before the measurement.
    """

    def __init__(self, config: ExperimentConfig):
        self._config = config
        self.pairs_per_second = 0.0

    def __call__(self, machine: Machine) -> Iterator[Finding]:
        """Yields time and memory compared with the plan, and a test of the same step run twice."""
        begin = time.perf_counter()
        blueprint, shapes, step = self._compiled(machine)
        compiling = time.perf_counter() - begin
        state, locked, _ = initialise(blueprint)
        batch = sharding.put_batch(blueprint.mesh, noise(shapes))
        # The step donates its state, so each of the two runs gets a copy.
        copies = [jax.tree.map(lambda x: x.copy(), state) for _ in range(2)]
        found = [step(copy, locked, batch) for copy in copies]
        del copies
        yield _same_bits([state for state, _ in found])
        del found
        seconds = []
        for _ in range(2 if machine.tiny else _STEPS):
            begin = time.perf_counter()
            state, metrics = step(state, locked, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
        each = statistics.median(seconds[1:])
        self.pairs_per_second = blueprint.config.global_batch_size / each
        finite = math.isfinite(float(metrics["loss"]))
        yield _speed(machine, blueprint, shapes, each, compiling, finite)
        yield from _memory(_bytes(step))

    def _compiled(self, machine: Machine) -> tuple[Blueprint, Any, Any]:
        """Returns blueprint, batch shapes and step, the batch being halved until it fits."""
        limit = (machine.device.memory_stats() or {}).get("bytes_limit", math.inf)
        config = self._config
        # One device is enough to see that it runs; a job of several processes needs all.
        devices = jax.devices()[: 1 if machine.tiny and jax.process_count() == 1 else None]
        least = len(devices) * config.accumulation_steps
        size = max(config.global_batch_size // least, 1) * least
        while True:
            config = dataclasses.replace(config, global_batch_size=size)
            blueprint = make_blueprint(config, sharding.make_mesh(config.mesh, devices))
            shapes = abstract_batch(blueprint)
            # a TPU compiler refuses steps that do not fit
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                step = TrainStep(blueprint).lower(shapes).compile()
                if _bytes(step) < USABLE_MEMORY * limit:
                    return blueprint, shapes, step
            if size < 2 * least:
                raise RuntimeError(f"not even a batch of {size} fits into {limit / 1e9:.0f} GB")
            size = max(size // 2 // least, 1) * least


def _bytes(step: Any) -> int:
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _same_bits(states: list[Any]) -> Finding:
    one, two = (
        {path: np.asarray(leaf.addressable_shards[0].data) for path, leaf in state.params.items()}
        for state in states
    )
    different = [path for path in one if not np.array_equal(one[path], two[path])]
    if not different:
        return Finding("same step twice", PASS, f"the same bits in {len(one)} leaves")
    return Finding(
        "same step twice",
        LOOK,
        f"{len(different)} of {len(one)} leaves differ, as {different[0]}",
        "XLA_FLAGS=--xla_gpu_deterministic_ops=true, where runs must resume bit for bit",
        {"leaves": different},
    )


def _speed(
    machine: Machine, blueprint: Blueprint, shapes: Any, seconds: float, compiling: float,
    finite: bool,
) -> Finding:  # fmt: skip
    config, chip = blueprint.config, machine.chip
    values = {"seconds": seconds, "pairs_per_second": config.global_batch_size / seconds,
              "batch": config.global_batch_size, "compile_seconds": compiling}  # fmt: skip
    said = (
        f"batch {config.global_batch_size:,}: {seconds:.3g} s, "
        f"{values['pairs_per_second']:,.0f} pairs/s, compiled in {compiling:.0f} s"
    )
    if not finite:
        return Finding("step", FAIL, said + "; its loss is not finite", "report it", values)
    if chip is None:
        return Finding("step", PASS, said, values=values)
    work = step_work(blueprint, shapes)
    plan = Estimate(blueprint, chip, (), shapes, work, None, "").times
    mfu = model_work(blueprint, shapes).total_flops / seconds / chip.half
    values |= {"mfu": mfu, "roofline_seconds": plan.roofline}
    said += f", MFU {mfu:.1%}; the plan's roofline is {plan.roofline:.3g} s ({plan.limit})"
    slow = seconds > _SLOW * plan.roofline
    advice = "--config.profile=10:3 in a run shows where the time goes" if slow else ""
    return Finding("step", LOOK if slow else PASS, said, advice, values)


def _memory(planned: int) -> Iterator[Finding]:
    """Yields the device's peak memory compared with the compiler's figure."""
    peak = peak_memory(jax.local_devices())
    if peak is None:
        return
    # Two copies of the state were in memory as well.
    near = 0.7 * planned < peak < 1.5 * planned
    yield Finding(
        "memory of the step",
        PASS if near else LOOK,
        f"peak {peak / 1e9:.2f} GB, the compiler's {planned / 1e9:.2f} GB",
        "" if near else "the plan's memory does not hold here; report it",
        {"peak": peak, "compiled": planned},
    )
