"""Estimates one config on one mesh of chips: counted work, state, and the compiler's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.planning.chips import Chip
from cwcl_jax.planning.compiled import Compiled, compile_step, largest_batch
from cwcl_jax.planning.inputs import AbstractBatch, abstract_batch, device_bytes
from cwcl_jax.planning.targets import NoCompiler, as_on, chip_devices, compiler_options
from cwcl_jax.planning.work import PRECISIONS, Work, count_work
from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint, make_blueprint
from cwcl_jax.training.step import GradientFunction

# Share of a chip's memory that a program may use; the rest is for the runtime and fragmentation.
USABLE_MEMORY = 0.9
# AdamW reads parameter, gradient and two moments, and writes all but the gradient.
_OPTIMIZER_TRAFFIC = 7
# Batches on a device besides the step's own and those of `data.prefetch`: that of a step that was
# dispatched ahead.
_BATCHES_AHEAD = 1
CUDNN_WANTS = (
    "it needs an NVIDIA GPU, bfloat16 or float16, and head sizes in multiples of 8 up to 128"
)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step at the chip's peaks, if each resource were the only limit."""

    compute: float
    memory: float
    network: float

    @property
    def roofline(self) -> float:
        """The lower bound of the time: all three overlap perfectly."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """The resource that limits the step."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step of a config needs on each device.

    Attributes:
      embedded: modalities whose features come with the data.
      work: counted work of the whole step.
      compiled: figures of the chip's own compiler; None if it was not asked, or refused.
      refused: the compiler's message if it refuses the step.
    """

    blueprint: Blueprint
    chip: Chip
    embedded: tuple[str, ...]
    batch: AbstractBatch
    work: Work
    compiled: Compiled | None
    refused: str

    @property
    def devices(self) -> int:
        return self.blueprint.mesh.size

    @property
    def state(self) -> dict[str, int]:
        """Bytes that are on a device between steps, by content; exact."""
        averages = device_bytes(self.blueprint.abstract_state().ema.values())
        more = {"averages of trained parameters": averages} if averages else {}
        return more | {
            "trained parameters, float32": device_bytes(self.blueprint.abstract_params.values()),
            "locked parameters": device_bytes(self.blueprint.abstract_locked.values()),
            "optimizer state": device_bytes(
                jax.tree.leaves(self.blueprint.abstract_state().opt_state)
            ),
        }

    @property
    def sent_ahead(self) -> int:
        """Bytes of the batches that wait on a device in addition to the step's own."""
        batches = self.blueprint.config.data.prefetch + _BATCHES_AHEAD
        return batches * device_bytes(jax.tree.leaves(self.batch))

    @property
    def bytes(self) -> float:
        """Bytes that a device needs at the peak of a step; infinite if the compiler refuses it."""
        if self.compiled is None:
            return float("inf")
        return self.compiled.arguments + self.compiled.temporary + self.sent_ahead

    @property
    def limit(self) -> float:
        """Bytes of a device that a run may use."""
        return USABLE_MEMORY * self.chip.memory

    @property
    def times(self) -> Times:
        rates = {precision: getattr(self.chip, precision) for precision in PRECISIONS}
        params = device_bytes(self.blueprint.abstract_params.values())
        touched = self.work.touched + device_bytes(jax.tree.leaves(self.batch))
        sent = self.compiled.sent if self.compiled else 0.0
        return Times(
            compute=sum(flops / rates[name] for name, flops in self.work.flops.items()),
            memory=(touched + _OPTIMIZER_TRAFFIC * params) / self.chip.bandwidth,
            network=sent / self.chip.sends(self.devices),
        )


class Planner:
    """Makes estimates of configs on one mesh.

    Attributes:
      missing: why nothing can be compiled for the mesh, or "".
    """

    def __init__(self, chip: Chip, count: int, *, compile_step: bool = True):
        self.chip = chip
        self.missing = "" if compile_step else "left out by --nocompile"
        self._devices: list[Any] = jax.devices()[:count]
        if compile_step:
            try:
                self._devices = chip_devices(chip, count)
            except NoCompiler as error:
                self.missing = str(error)
        if len(self._devices) < count:
            raise ConfigError(f"this process has {len(self._devices)} devices, not {count}")

    def blueprint(self, config: ExperimentConfig) -> Blueprint:
        """Returns the static description of a run on this mesh."""
        return make_blueprint(config, sharding.make_mesh(config.mesh, self._devices))

    def estimate(self, config: ExperimentConfig, embedded: Collection[str] = ()) -> Estimate:
        """Returns the estimate of a config.

        Raises:
          ConfigError: the config cannot run on such a mesh.
        """
        blueprint = self.blueprint(config)
        batch = abstract_batch(blueprint, embedded)
        compiled, refused = None, ""
        with as_on(self.chip):
            work = self._work(blueprint, batch)
            if not self.missing:
                try:
                    compiled = compile_step(blueprint, batch, compiler_options(self.chip))
                # a TPU compiler refuses steps that do not fit
                except jax.errors.JaxRuntimeError as error:
                    refused = str(error).splitlines()[0]
        return Estimate(blueprint, self.chip, tuple(embedded), batch, work, compiled, refused)

    def _work(self, blueprint: Blueprint, batch: AbstractBatch) -> Work:
        config, reason = blueprint.config, None
        asked = any(tower.attention == "cudnn" for tower in config.towers.values())
        try:
            work = step_work(blueprint, batch)
        # raised by JAX if cuDNN does not support the arguments
        except (NotImplementedError, ValueError) as error:
            if not asked:
                raise
            reason = error
        else:
            if self.chip.is_gpu or not asked:
                return work
        raise ConfigError(
            f"attention='cudnn' cannot run on {self.chip.name} with dtype={config.dtype!r}: "
            f"{CUDNN_WANTS}; leave config.towers.<modality>.attention at 'auto'"
        ) from reason

    def largest_batch(self, base: Estimate) -> int:
        """Returns the largest global batch that fits, all else equal, from a few compilations."""
        config = base.blueprint.config

        def bytes_of(size: int) -> float:
            changed = dataclasses.replace(config, global_batch_size=size)
            return self.estimate(changed, base.embedded).bytes

        step = base.devices * config.accumulation_steps
        return largest_batch(
            bytes_of, config.global_batch_size, base.bytes, step=step, limit=base.limit
        )


def step_work(blueprint: Blueprint, batch: AbstractBatch) -> Work:
    """Returns one device's work in a step: gradients of its examples, and the optimizer update."""
    arguments = (
        blueprint.abstract_params,
        {**blueprint.abstract_locked, **blueprint.abstract_statistics},
        batch,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    work = count_work(GradientFunction(blueprint), *arguments, devices=blueprint.mesh.size)
    state = blueprint.abstract_state()
    update = count_work(
        blueprint.optimizer().update, state.params, state.opt_state, state.params,
        devices=blueprint.mesh.shape["fsdp"],
    )  # fmt: skip
    for precision, flops in update.flops.items():
        work.add_product(flops, precision, 0.0)
    work.touched += update.touched
    return work
