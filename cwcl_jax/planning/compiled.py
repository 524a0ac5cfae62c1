"""The real train step, compiled and never run: what XLA says of it.

By the chip's own compiler where it is installed, else for as many virtual CPU devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from cwcl_jax.planning.estimate import Estimate
from cwcl_jax.planning.hlo import product_flops
from cwcl_jax.planning.inputs import AbstractBatch, abstract_batch
from cwcl_jax.planning.targets import chip_devices, compiler_options, cudnn_assumed
from cwcl_jax.planning.towers import has_blocks
from cwcl_jax.training import sharding
from cwcl_jax.training.collectives import Traffic, traffic
from cwcl_jax.training.state import Blueprint, make_blueprint
from cwcl_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's figures for one device.

    Attributes:
      own: whether the chip's own compiler says so, and not the CPU's.
      argument_bytes: state, locked leaves and one batch.
      temporary_bytes: the most that is allocated besides, during a step.
      cost_flops: of its cost analysis, which counts the body of a loop once.
      product_flops: of matrix products with loops counted as often as they run; 0 where they are
        calls of a library.
      traffic: collectives by kind.
      seconds: that lowering and compiling took.
      refused: why the chip's own compiler did not take the step, where the CPU's stands in for it.
    """

    own: bool
    argument_bytes: int
    temporary_bytes: int
    cost_flops: float
    product_flops: float
    traffic: dict[str, Traffic]
    seconds: float
    refused: str = ""


def compile_for_chip(base: Estimate) -> Compiled:
    """Compiles the step of an estimate."""
    config = base.blueprint.config
    devices = chip_devices(base.chip, base.devices)
    if devices is None:
        return compile_step(base.blueprint, base.batch)
    # What the model would find out by trying, on the device.
    towers = {}
    for modality, tower in config.towers.items():
        fused = base.fused[modality] and has_blocks(tower)
        towers[modality] = dataclasses.replace(tower, attention="cudnn" if fused else "xla")
    config = dataclasses.replace(config, towers=towers)
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh, devices))
    batch, options = abstract_batch(blueprint, base.embedded), compiler_options(base.chip)
    with cudnn_assumed() if any(base.fused.values()) else contextlib.nullcontext():
        try:
            return compile_step(blueprint, batch, own=True, options=options)
        except jax.errors.JaxRuntimeError as error:  # a TPU's refuses what has no room
            refused = str(error).splitlines()[0]
    return dataclasses.replace(compile_step(base.blueprint, base.batch), refused=refused)


def compile_step(
    blueprint: Blueprint,
    batch: AbstractBatch,
    *,
    own: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles the step for the blueprint's mesh."""
    start = time.perf_counter()
    compiled = TrainStep(blueprint).lower(batch).compile(dict(options or {}))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    text = compiled.as_text()
    return Compiled(
        own=own,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        cost_flops=float(costs.get("flops", 0.0)),
        product_flops=product_flops(text),
        traffic=traffic(text),
        seconds=seconds,
    )
