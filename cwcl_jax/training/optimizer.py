"""Schedules and the optimizer over a flat dict of trained leaves, path -> array."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

from cwcl_jax.training.options import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from 0, then the named schedule."""
    rest = max(total_steps - config.warmup_steps, 1)
    peak = config.learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "rsqrt":
        after = rsqrt_schedule(peak, config.rsqrt_timescale)
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    # Step 0 of the warm-up has a positive rate: an update with learning rate 0 is a wasted step.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def rsqrt_schedule(peak: float, timescale: int) -> optax.Schedule:
    """Returns the schedule `peak * sqrt(timescale / (timescale + step))`."""
    return lambda step: peak * (timescale / (timescale + step)) ** 0.5


def decay_mask(config: OptimizerConfig, paths: Iterable[str]) -> dict[str, bool]:
    """Returns which leaves decay.

    Raises:
      ValueError: the expression is invalid, or weight decay is on and it matches no leaf.
    """
    expression = _compiled(config.decay, f"config.optimizer.decay={config.decay!r}")
    mask = {path: expression.fullmatch(path) is not None for path in paths}
    if config.weight_decay and not any(mask.values()):
        raise ValueError(
            f"config.optimizer.decay={config.decay!r} matches no trained leaf; paths look like "
            f"{next(iter(mask), '(none)')!r}"
        )
    return mask


def learning_rate_factors(config: OptimizerConfig, paths: Iterable[str]) -> dict[str, float]:
    """Returns the learning rate's factor by path: the first matching multiplier or layer decay.

    Raises:
      ValueError: an entry is not "regex=factor", or matches no leaf.
    """
    paths = list(paths)
    factors = layer_decay_factors(config.layer_decay, paths)
    unclaimed = set(paths)
    for entry in config.multipliers:
        expression, factor = _multiplier(entry)
        matched = [path for path in paths if expression.fullmatch(path)]
        if not matched:
            raise ValueError(
                f"config.optimizer.multipliers entry {entry!r} matches no trained leaf; paths "
                f"look like {paths[0]!r}"
            )
        for path in unclaimed.intersection(matched):
            factors[path] = factor
        unclaimed.difference_update(matched)
    return factors


def _multiplier(entry: str) -> tuple[re.Pattern[str], float]:
    name = f"config.optimizer.multipliers entry {entry!r}"
    expression, separator, text = entry.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not separator or not 0 <= factor < math.inf:
        raise ValueError(f"{name} is not 'regex=factor' with a factor of at least 0")
    return _compiled(expression, name), factor


def _compiled(expression: str, name: str) -> re.Pattern[str]:
    """Returns the compiled expression.

    Raises:
      ValueError: it is not a regular expression; the message begins with `name`.
    """
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name} is not a regular expression: {error}") from error


_BLOCK = re.compile(r"(.*/)blocks/(\d+)/.*")
_STACKED = re.compile(r".*/blocks/(?!\d+/).*")
# Leaves above the blocks, which keep the full rate. All others besides the blocks precede them.
_ABOVE = re.compile(r"(final_)?norm/.*|pool\w*/.*")


def layer_decay_factors(decay: float, paths: Iterable[str]) -> dict[str, float]:
    """Returns `decay ** depth below the top`: heads and final norms 1, embeddings the least.

    Raises:
      ValueError: the layers of a tower are stacked in one leaf, which has only one factor.
    """
    paths = list(paths)
    if decay == 1.0:
        return dict.fromkeys(paths, 1.0)
    blocks: dict[str, int] = {}
    for path in paths:
        if _STACKED.fullmatch(path):
            raise ValueError(
                f"config.optimizer.layer_decay={decay} cannot give separate factors to the layers "
                f"stacked in {path!r}: set the tower's scan_layers=False"
            )
        if match := _BLOCK.fullmatch(path):
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
    return {path: decay ** _depth(path, blocks) for path in paths}


def _depth(path: str, blocks: Mapping[str, int]) -> int:
    """Returns the number of layers between a leaf and the top of its encoder."""
    encoder = next((prefix for prefix in blocks if path.startswith(prefix)), None)
    if encoder is None:
        return 0
    if match := _BLOCK.fullmatch(path):
        return blocks[encoder] - int(match[2])
    return 0 if _ABOVE.fullmatch(path.removeprefix(encoder)) else blocks[encoder] + 1


def _muon_and(
    adam: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Returns Muon for the kernels inside blocks, Adam for all other leaves."""

    def dimensions(leaves: Any) -> Any:
        return {
            path: leaf if isinstance(leaf, optax.MaskedNode) else _matrix_axes(path, leaf.ndim)
            for path, leaf in leaves.items()
        }

    def match_adam(updates: Any, params: Any = None) -> Any:
        del params
        return {
            path: leaf
            if isinstance(leaf, optax.MaskedNode)
            else _ADAM_RMS * _larger_side(path, leaf) ** 0.5 * leaf
            for path, leaf in updates.items()
        }

    muon = optax.chain(
        contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=dimensions),
        optax.stateless(match_adam),
    )

    def labels(params: Any) -> Any:
        return {path: "muon" if _HIDDEN.fullmatch(path) else "adam" for path in params}

    return optax.partition({"muon": muon, "adam": adam}, labels)


_HIDDEN = re.compile(r".*/blocks/.*/kernel")
# An orthogonal matrix times this and the square root of its larger side has the root mean square of
# Adam's updates, so that one learning rate suits both (Liu et al. 2025, arXiv 2502.16982).
_ADAM_RMS = 0.2


def _matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers:
    """Returns a kernel's matrix axes: all before the last are inputs, except the layers' axis."""
    first = 1 if _STACKED.fullmatch(path) else 0
    return contrib.MuonDimensionNumbers(tuple(range(first, ndim - 1)), (ndim - 1,))


def _larger_side(path: str, leaf: jax.Array) -> int:
    first = 1 if _STACKED.fullmatch(path) else 0
    return max(math.prod(leaf.shape[first:-1]), leaf.shape[-1])


def make_optimizer(
    config: OptimizerConfig, total_steps: int, paths: Iterable[str]
) -> optax.GradientTransformation:
    """Returns AdamW or Muon, with clipping, a decay mask and learning-rate factors by path."""
    paths = list(paths)
    factors = learning_rate_factors(config, paths)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    steps = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        adam if config.name == "adamw" else _muon_and(adam, config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, paths)),
        scale_by_learning_rates(make_schedule(config, total_steps), factors),
    ]
    return optax.chain(*steps)


def scale_by_learning_rates(
    schedule: optax.Schedule, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates by the learning rate and own factors.

    It is a single transformation, so that the state is the same for any factors: they may be
    changed when a run is resumed.
    """
    common = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = common.update(updates, state, params)
        return {path: value * factors[path] for path, value in updates.items()}, state

    return optax.GradientTransformation(common.init, update)
