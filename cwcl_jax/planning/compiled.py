"""The real train step, compiled for a virtual mesh and never run: what XLA says of it."""

from __future__ import annotations

import dataclasses
import time

from cwcl_jax.planning.hlo import product_flops
from cwcl_jax.planning.inputs import AbstractBatch
from cwcl_jax.training.collectives import Traffic, traffic
from cwcl_jax.training.state import Blueprint
from cwcl_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's figures for one device.

    Attributes:
      argument_bytes: state, locked leaves and one batch.
      temporary_bytes: the most that is allocated besides, during a step.
      cost_flops: of its cost analysis, which counts the body of a loop once.
      product_flops: of matrix products with loops counted as often as they run.
      traffic: collectives by kind.
      seconds: that lowering and compiling took.
    """

    argument_bytes: int
    temporary_bytes: int
    cost_flops: float
    product_flops: float
    traffic: dict[str, Traffic]
    seconds: float


def compile_step(blueprint: Blueprint, batch: AbstractBatch) -> Compiled:
    """Compiles the step for the blueprint's mesh."""
    start = time.perf_counter()
    compiled = TrainStep(blueprint).lower(batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    text = compiled.as_text()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        cost_flops=float(costs.get("flops", 0.0)),
        product_flops=product_flops(text),
        traffic=traffic(text),
        seconds=seconds,
    )
