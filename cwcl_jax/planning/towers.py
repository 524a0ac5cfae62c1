"""What each tower needs for an example: kept for the backward pass, and in the forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.models.attention import cudnn_takes
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.planning.graph import trace
from cwcl_jax.planning.inputs import inputs_of
from cwcl_jax.planning.kept import Kept, kept_for_backward
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig, OptimizerConfig
from cwcl_jax.training.state import Blueprint, make_blueprint

# Traced batch sizes: what a tower needs is linear in the number of examples.
_FEW, _MORE = 2, 4
# Of configs whose towers are changed to be traced: the run's own may name leaves (layer_decay,
# multipliers, decay) that these do not have. No gradient depends on it.
ANY_OPTIMIZER = OptimizerConfig(weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class TowerNeeds:
    """Bytes for one example on a device.

    Attributes:
      kept: for the backward pass, without attention's tokens x tokens arrays; 0 if locked.
      kept_scores: those arrays, if attention is not fused.
      working: of the arrays that a forward or backward pass has in hand besides.
      features: of the output, in the compute type.
    """

    kept: float
    kept_scores: float
    working: float
    working_scores: float
    features: float


def tower_needs(config: ExperimentConfig, modality: str, embedded: Collection[str]) -> TowerNeeds:
    """The needs of one tower as the step runs it: locked encoders without derivative.

    Traced with one and with two blocks, where a tower has blocks that are all alike: every
    further block adds what the second one did.
    """
    tower = config.towers[modality]
    if not blocks_are_alike(tower) or modality in embedded:
        return _per_example(config, modality, embedded)
    one, two = (
        _per_example(_with_depth(config, modality, depth), modality, embedded) for depth in (1, 2)
    )
    depth = _settings(config, modality).depth
    grown = {
        field: getattr(one, field) + (depth - 1) * (getattr(two, field) - getattr(one, field))
        for field in ("kept", "kept_scores")
    }
    if tower.remat not in ("auto", "none") and not _is_locked(config, modality):
        grown["working"] = two.working + _one_block(config, modality, embedded)
    return dataclasses.replace(two, **grown)


def has_blocks(tower: TowerConfig) -> bool:
    """Whether the encoder is a stack of equal blocks."""
    return tower.encoder not in ("conv_speech", "precomputed")


def blocks_are_alike(tower: TowerConfig) -> bool:
    """Whether the tower is a stack of equal blocks of which all train, or none."""
    return has_blocks(tower) and tower.tune in ("all", "none", "head")


def _is_locked(config: ExperimentConfig, modality: str) -> bool:
    return config.towers[modality].tune in ("none", "head")


def _with_depth(config: ExperimentConfig, modality: str, depth: int) -> ExperimentConfig:
    """The config with another depth of this tower, and the other tower out of the way."""
    tower = config.towers[modality]
    changed = dataclasses.replace(
        tower, overrides={**tower.overrides, "depth": depth}, scan_layers=False
    )
    return dataclasses.replace(config, towers={**config.towers, modality: changed})


def _one_block(config: ExperimentConfig, modality: str, embedded: Collection[str]) -> float:
    """What the backward pass of a rematerialised block computes again and holds for a moment."""
    plain = dataclasses.replace(config.towers[modality], remat="none")
    config = dataclasses.replace(config, towers={**config.towers, modality: plain})
    one, two = (
        _per_example(_with_depth(config, modality, depth), modality, embedded) for depth in (1, 2)
    )
    return two.kept - one.kept


def _per_example(config: ExperimentConfig, modality: str, embedded: Collection[str]) -> TowerNeeds:
    blueprint = _lone_blueprint(config, modality)
    few = _traced(blueprint, modality, modality in embedded, _FEW)
    more = _traced(blueprint, modality, modality in embedded, _MORE)
    return TowerNeeds(
        **{
            field.name: max(0.0, getattr(more, field.name) - getattr(few, field.name))
            / (_MORE - _FEW)
            for field in dataclasses.fields(TowerNeeds)
        }
    )


def _lone_blueprint(config: ExperimentConfig, modality: str) -> Blueprint:
    """One device, and in place of the other tower one that reads features."""
    (other,) = [name for name in config.towers if name != modality]
    stand_in = TowerConfig("precomputed", overrides={"width": config.embed_dim})
    towers = {**config.towers, other: stand_in}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = dataclasses.replace(config, towers=towers, mesh=MeshConfig(), optimizer=ANY_OPTIMIZER)
    return make_blueprint(shapes, mesh, check_batch=False)


def _traced(blueprint: Blueprint, modality: str, embedded: bool, examples: int) -> TowerNeeds:
    """The needs of a batch."""
    prefix = f"towers/{modality}/"
    leaves = {p: _plain(leaf) for p, leaf in blueprint.abstract.items()}
    trained = {p: leaf for p, leaf in leaves.items() if p in blueprint.trained}
    own = {p: leaf for p, leaf in trained.items() if p.startswith(prefix)}
    rest = {p: leaf for p, leaf in leaves.items() if p not in own}
    inputs = jax.tree.map(_plain, inputs_of(blueprint, modality, examples, embedded))

    def tower(own: Mapping[str, Any], rest: Mapping[str, Any]) -> Any:
        return blueprint.model_def.merge({**own, **rest}).towers[modality]

    def features(own: Mapping[str, Any], rest: Mapping[str, Any], inputs: Any) -> Any:
        locked = blueprint.features_are_locked(modality)
        rngs = None if locked else nnx.Rngs(dropout=0)
        return tower(own, rest).features(inputs, rngs=rngs)

    made = jax.eval_shape(features, own, rest, inputs)
    if blueprint.features_are_locked(modality):
        kept = _kept(lambda p, r, x: tower(p, r).project(x), own, rest, made)
    else:
        kept = _kept(lambda p, r, x: tower(p, r).project(features(p, r, x)), own, rest, inputs)
    forward, scores = _largest(features, own, rest, inputs)
    return TowerNeeds(
        kept=kept.other,
        kept_scores=kept.scores,
        # Two arrays of the widest kind (before and after the activation) and the block's input.
        working=2.25 * max(forward, kept.largest),
        working_scores=1.5 * scores,
        features=made.size * made.dtype.itemsize,
    )


def _kept(function: Any, own: Any, rest: Any, inputs: Any) -> Kept:
    if not own:
        return Kept(0, 0, 0)
    return kept_for_backward(function, own, rest, inputs)


def _plain(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without a sharding: the shape on one device is what counts."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _largest(function: Any, *arguments: Any) -> tuple[int, int]:
    """The largest operand or result of a product: of any, and of attention's scores."""
    sizes, scores = [0], [0]
    for value in trace(function, *arguments).values:
        if value.operation == "dot_general":
            for part in (value, *value.operands):
                if part.operation != "input":
                    (scores if part.is_scores else sizes).append(part.bytes)
    return max(sizes), max(scores)


def _settings(config: ExperimentConfig, modality: str) -> Any:
    tower = config.towers[modality]
    return encoder_config(tower.encoder, tower.preset, tower.overrides, tower.pooling)


def attention_is_fused(blueprint: Blueprint, modality: str, *, chip_has_it: bool) -> bool:
    """Whether this tower's attention runs in cuDNN's kernel, by the model's own rule.

    True also for a tower without attention blocks, which has nothing to fuse.
    """
    tower = blueprint.config.towers[modality]
    settings = _settings(blueprint.config, modality)
    if not has_blocks(tower):
        return True
    if not chip_has_it or tower.attention == "xla":
        return False
    head_dim = settings.width // settings.heads
    dtype = jax.numpy.dtype(tower.dtype or blueprint.config.dtype)
    return cudnn_takes(dtype, head_dim)


def attention_tokens(blueprint: Blueprint, modality: str) -> int:
    """Tokens of one example in the attention; 0 without any."""
    data, tower = blueprint.config.data, blueprint.config.towers[modality]
    settings = _settings(blueprint.config, modality)
    if not has_blocks(tower):
        return 0
    arrays = data.inputs_of(modality).arrays()
    if "pixels" in arrays:
        return settings.tokens
    if "tokens" in arrays:
        return arrays["tokens"].shape[0]
    if getattr(settings, "attend_padding", False):
        return settings.max_positions
    return arrays["waveform"].shape[0] // 320
