"""Bytes on one device, reckoned: what lies there all the time, and what one step adds at its peak.

The state is exact. What a step adds is a model of a compiler that fuses elementwise work
(`cwcl_jax.planning.kept`); XLA's own analysis for the CPU backend stands beside it in the plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from cwcl_jax.losses.options import LossConfig, resolve
from cwcl_jax.losses.tiles import Tiling
from cwcl_jax.planning.inputs import AbstractBatch
from cwcl_jax.planning.towers import TowerNeeds
from cwcl_jax.training.state import Blueprint

# Batches on a device at a time: the step's own, the next ones that were sent ahead, and those of
# steps that were dispatched already.
_BATCHES_BESIDES_PREFETCH = 2
# Arrays of a tile's size that one tile of the loss needs: logits, exponentials, the gradient.
_ARRAYS_OF_A_TILE = 3
# Arrays of all pairs that the dense loss has at once, as XLA for the A100 says (3.1 to 4.0, 6.3
# where duplicates are masked, 2.1 for the sigmoid loss); for CPUs it says twice as many.
_DENSE_ARRAYS, _DENSE_ARRAYS_MASKED, _DENSE_ARRAYS_SIGMOID = 4, 6, 2


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      params, locked, optimizer: the state, exact.
      batches: inputs of the step and of those sent ahead.
      gradients: of the trained leaves.
      activations: kept between forward and backward pass, with what a pass has in hand.
      attention: the tokens x tokens part of these, 0 where attention is fused.
      loss: embeds of all candidates (gathered) or of two blocks (ring), and its tiles.
    """

    params: float
    locked: float
    optimizer: float
    batches: float
    gradients: float
    activations: float
    attention: float
    loss: float

    @property
    def state(self) -> float:
        """What lies there between steps."""
        return self.params + self.locked + self.optimizer

    @property
    def total(self) -> float:
        """At the peak of a step; loss and gradients are not needed at the same time."""
        passing = max(self.gradients, self.loss)
        return self.state + self.batches + self.activations + self.attention + passing


def state_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of one device's shards of abstract leaves."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes on one device that do not depend on the batch."""

    params: int
    locked: int
    optimizer: int

    @classmethod
    def of(cls, blueprint: Blueprint) -> State:
        """From the shardings of the run's own abstract state."""
        return cls(
            params=state_bytes(blueprint.abstract_params.values()),
            locked=state_bytes(blueprint.abstract_locked.values()),
            optimizer=state_bytes(jax.tree.leaves(blueprint.abstract_state().opt_state)),
        )


def memory(
    blueprint: Blueprint,
    state: State,
    batch: AbstractBatch,
    needs: Mapping[str, TowerNeeds],
    fused: Mapping[str, bool],
    *,
    ring: bool,
    weights_width: int,
    global_batch_size: int = 0,
) -> Memory:
    """The reckoning for a global batch, by default the config's.

    Args:
      state: of this blueprint.
      batch: abstract inputs of the config's own global batch.
      needs: of each tower.
      fused: whether each tower's attention keeps no tokens x tokens arrays.
      ring: whether the loss passes blocks around, rather than gathering all embeds.
      weights_width: of the features that give the weights.
    """
    config = blueprint.config
    size = global_batch_size or config.global_batch_size
    on_device = size / blueprint.mesh.size
    chunk = on_device / config.accumulation_steps
    inputs = state_bytes(jax.tree.leaves(batch)) * size / config.global_batch_size
    activations, attention = _passes(blueprint, needs, fused, chunk)
    if config.accumulation_steps > 1:
        # GradCache keeps locked features and all embeds over both passes.
        features = sum(
            needs[m].features for m in config.modalities if blueprint.features_are_locked(m)
        )
        activations += on_device * (features + 4 * 4 * config.embed_dim)
    return Memory(
        **dataclasses.asdict(state),
        batches=inputs * (config.data.prefetch + _BATCHES_BESIDES_PREFETCH),
        gradients=state.params * (2 if config.accumulation_steps > 1 else 1),
        activations=activations,
        attention=attention,
        loss=_loss_bytes(blueprint, size, weights_width, ring=ring),
    )


def _passes(
    blueprint: Blueprint,
    needs: Mapping[str, TowerNeeds],
    fused: Mapping[str, bool],
    chunk: float,
) -> tuple[float, float]:
    """Activations of a chunk of examples, and attention's part, at the worst of its moments.

    A locked tower runs before the tuned one keeps anything.
    """
    kept = scores = 0.0
    moments = []
    for modality, need in needs.items():
        in_hand = chunk * need.working
        in_hand_scores = 0.0 if fused[modality] else chunk * need.working_scores
        if blueprint.features_are_locked(modality):
            moments.append((in_hand + chunk * need.kept, in_hand_scores))
            continue
        kept += chunk * need.kept
        scores += 0.0 if fused[modality] else chunk * need.kept_scores
        moments.append((kept + in_hand, scores + in_hand_scores))
    return max(moments, key=sum)


def _loss_bytes(blueprint: Blueprint, size: int, weights_width: int, *, ring: bool) -> float:
    """Embeds of the other side, their gradient, and one tile, or all pairs in the dense form."""
    config, devices = blueprint.config, blueprint.mesh.size
    own = max(1, round(size / devices))
    columns = own if ring else size
    loss = config.loss
    if loss.form == "dense":
        pairs = _dense_arrays(loss) * own * columns
    else:
        # As many as the config's whole batch are all columns of any batch: who plans has a CPU,
        # where 0 means fewer (`plan.on_chip`).
        limit = loss.block_columns if loss.block_columns < config.global_batch_size else 0
        tiling = Tiling(block_size=loss.block_size, block_columns=limit or columns)
        pairs = _ARRAYS_OF_A_TILE * math.prod(tiling.tile(own, columns, 4))
    travelling = 4 if ring else 2  # a block, the next one, and the gradients of both
    values = (2 * own + travelling * columns) * config.embed_dim + own * weights_width + pairs
    if devices > 1 and loss.form != "dense" and _weights_are_of_pairs(loss):
        values += (2 if ring else 1) * columns * weights_width
    return 4.0 * values  # u, v, p; what travels; the pairs


def _weights_are_of_pairs(loss: LossConfig) -> bool:
    """Whether a tile makes its weights of p, whose columns then travel too.

    Weights that are affine in the cosine have a closed form, which needs sums over the batch only.
    """
    return resolve(loss).tiles_read_features


def _dense_arrays(loss: LossConfig) -> int:
    frame = resolve(loss)
    if frame.kind == "sigmoid":
        return _DENSE_ARRAYS_SIGMOID
    return _DENSE_ARRAYS if frame.duplicates == "negatives" else _DENSE_ARRAYS_MASKED
