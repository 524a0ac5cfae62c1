"""One config on one mesh of chips, reckoned without compiling: memory, work, traffic, time."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.config import ExperimentConfig, to_json, to_plain
from cwcl_jax.losses import make_loss
from cwcl_jax.losses.make import GATHERED_BYTES
from cwcl_jax.losses.options import LossConfig, needs_bias, resolve
from cwcl_jax.planning.chips import Chip
from cwcl_jax.planning.communication import sent_bytes
from cwcl_jax.planning.inputs import AbstractBatch, abstract_batch, feature_width
from cwcl_jax.planning.memory import Memory, State, memory, state_bytes
from cwcl_jax.planning.towers import (
    ANY_OPTIMIZER,
    TowerNeeds,
    attention_is_fused,
    attention_tokens,
    blocks_are_alike,
    tower_needs,
)
from cwcl_jax.planning.work import PRECISIONS, Work, count_work
from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint, make_blueprint
from cwcl_jax.training.step import GradientFunction

# Of a chip's memory, what a program may use; the rest is the runtime's and fragmentation.
USABLE_MEMORY = 0.9
# AdamW reads parameter, gradient and two moments, and writes all but the gradient.
_OPTIMIZER_TRAFFIC = 7


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step at the chip's peaks, if each resource were the only limit."""

    compute: float
    memory: float
    network: float

    @property
    def roofline(self) -> float:
        """The least time: all three overlap perfectly."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """The resource that decides."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step of a config needs on each device.

    Attributes:
      work: of the whole step; `loss_work` of the loss and its gradient alone.
      sent: bytes by purpose.
      fused: by modality, whether attention runs in a fused kernel.
    """

    blueprint: Blueprint
    chip: Chip
    embedded: tuple[str, ...]
    state: State
    batch: AbstractBatch
    needs: dict[str, TowerNeeds]
    fused: dict[str, bool]
    work: Work
    loss_work: Work
    sent: dict[str, float]

    @property
    def devices(self) -> int:
        return self.blueprint.mesh.size

    @functools.cached_property
    def memory(self) -> Memory:
        """At the config's batch."""
        return self.memory_of(self.blueprint.config.global_batch_size)

    def memory_of(self, global_batch_size: int) -> Memory:
        """At another batch, all else equal."""
        return memory(
            self.blueprint, self.state, self.batch, self.needs, self.fused,
            ring=self._is_ring(global_batch_size), weights_width=self._weights_width,
            global_batch_size=global_batch_size,
        )  # fmt: skip

    @functools.cached_property
    def _weights_width(self) -> int:
        """Of p, the features that give the weights."""
        return feature_width(self.blueprint, self.blueprint.config.loss.weights_from)

    def _is_ring(self, size: int) -> bool:
        """The loss's own choice of its form, for another batch."""
        config = self.blueprint.config
        if config.loss.form != "auto" or self.devices == 1:
            return "ppermute" in self.work.sent
        # The step hands p to every loss, also to those that do not use it.
        return size * (config.embed_dim + self._weights_width) * 4 > GATHERED_BYTES

    @property
    def _fused_tokens(self) -> set[int]:
        """Scores are known by their size: towers of as many tokens have theirs in one number."""
        return {attention_tokens(self.blueprint, m) for m, fused in self.fused.items() if fused}

    @property
    def flops(self) -> dict[str, float]:
        """Of products, by precision, on the chip.

        The traced attention multiplies gradients of its weights in float32, a fused kernel in the
        type of its arrays.
        """
        flops = dict(self.work.flops)
        narrowed = sum(self.work.score_flops.get(number, 0.0) for number in self._fused_tokens)
        if narrowed:
            flops["half"] = flops.get("half", 0.0) + narrowed
            flops["single"] -= narrowed
        least = 1e-9 * self.work.total_flops  # less is what rounding leaves
        return {precision: value for precision, value in flops.items() if value > least}

    @property
    def times(self) -> Times:
        rates = {p: getattr(self.chip, p) for p in PRECISIONS}
        touched = self.work.product_bytes - sum(
            self.work.score_bytes.get(number, 0.0) for number in self._fused_tokens
        )
        touched += _OPTIMIZER_TRAFFIC * self.state.params + state_bytes(jax.tree.leaves(self.batch))
        return Times(
            compute=sum(flops / rates[p] for p, flops in self.flops.items()),
            memory=touched / self.chip.bandwidth,
            network=sum(self.sent.values()) / self.chip.sends(self.devices),
        )

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE_MEMORY * self.chip.memory

    def largest_batch(self) -> int:
        """The largest global batch that fits, 0 if none does."""
        step = self.devices * self.blueprint.config.accumulation_steps
        limit = USABLE_MEMORY * self.chip.memory

        def fits(k: int) -> bool:
            return self.memory_of(k * step).total <= limit

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * step


class Planner:
    """Reckons configs on one mesh; what two of them share is traced once."""

    def __init__(self, chip: Chip, devices: list[Any]):
        self.chip = chip
        self.devices = devices
        self._blueprints: dict[str, tuple[Blueprint, State]] = {}
        self._needs: dict[str, TowerNeeds] = {}

    def estimate(self, config: ExperimentConfig, embedded: Collection[str] = ()) -> Estimate:
        """The reckoning of a config.

        Raises:
          ConfigError: the config cannot run on such a mesh.
        """
        mesh = sharding.make_mesh(config.mesh, self.devices)
        blueprint, state = self._blueprint(config, mesh)
        work = _step_work(config, mesh, embedded)
        return Estimate(
            blueprint=blueprint,
            chip=self.chip,
            embedded=tuple(embedded),
            state=state,
            batch=abstract_batch(blueprint, embedded),
            needs={m: self._needs_of(blueprint, m, embedded) for m in config.modalities},
            fused={
                m: attention_is_fused(blueprint, m, chip_has_it=self.chip.is_gpu)
                for m in config.modalities
            },
            work=work,
            loss_work=_loss_work(blueprint),
            sent=sent_bytes(blueprint, work, is_gpu=self.chip.is_gpu),
        )

    def _blueprint(self, config: ExperimentConfig, mesh: Any) -> tuple[Blueprint, State]:
        """Shapes of the state; batch, chunks and the loss's form do not enter them."""
        shapes = dataclasses.replace(
            config,
            global_batch_size=mesh.size,
            accumulation_steps=1,
            loss=LossConfig(name=config.loss.name, weights_from=config.loss.weights_from),
        )
        key = to_json(shapes)
        if key not in self._blueprints:
            made = make_blueprint(shapes, mesh)
            self._blueprints[key] = made, State.of(made)
        made, state = self._blueprints[key]
        return dataclasses.replace(made, config=config), state

    def _needs_of(
        self, blueprint: Blueprint, modality: str, embedded: Collection[str]
    ) -> TowerNeeds:
        config = blueprint.config
        parts = (config.towers[modality], config.data, config.dtype, config.embed_dim)
        key = json.dumps([modality, modality in embedded, *map(to_plain, parts)], default=str)
        if key not in self._needs:
            self._needs[key] = tower_needs(config, modality, embedded)
        return self._needs[key]


def _step_work(config: ExperimentConfig, mesh: Any, embedded: Collection[str]) -> Work:
    """Gradients of the whole step; blocks as a loop, which is the same work and traced faster."""
    towers = {
        modality: dataclasses.replace(tower, scan_layers=blocks_are_alike(tower))
        for modality, tower in config.towers.items()
    }
    traced = dataclasses.replace(config, towers=towers, optimizer=ANY_OPTIMIZER)
    blueprint = make_blueprint(traced, mesh)
    arguments = (
        blueprint.abstract_params,
        blueprint.abstract_locked,
        abstract_batch(blueprint, embedded),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return count_work(GradientFunction(blueprint), *arguments, devices=mesh.size)


def _loss_work(blueprint: Blueprint) -> Work:
    """The loss alone: value and the gradients that the step asks for."""
    config = blueprint.config
    loss = make_loss(config.loss, mesh=blueprint.mesh, axes=sharding.BATCH_AXES)
    split = sharding.batch_sharding(blueprint.mesh)
    u, v = config.modalities
    widths = (config.embed_dim, config.embed_dim, feature_width(blueprint, u))
    arrays = [
        jax.ShapeDtypeStruct((config.global_batch_size, width), jnp.float32, sharding=split)
        for width in widths
    ]
    trained = tuple(
        number
        for number, modality in enumerate((u, v))
        if any(path.startswith(f"towers/{modality}/") for path in blueprint.trained)
    )

    def gradient(u: Any, v: Any, p: Any) -> Any:
        scale = jnp.zeros((), jnp.float32)
        labels = jnp.arange(u.shape[0], dtype=jnp.int32) if config.data.labels else None
        bias = scale if needs_bias(config.loss) else None

        def value(u: Any, v: Any) -> Any:
            # V's own features, where the loss reads them, are taken to be as wide as its embeds.
            q = v if resolve(config.loss).needs_q else None
            return loss(u, v, p, scale, logit_bias=bias, labels=labels, q=q, progress=scale)[0]

        return jax.grad(value, trained)(u, v)

    return count_work(gradient, *arrays, devices=blueprint.mesh.size)
