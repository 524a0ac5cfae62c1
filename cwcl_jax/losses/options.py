"""What a contrastive loss can be told, as one frozen dataclass, and presets of published variants.

The equations behind the fields stand in `cwcl_jax.losses.reference`. U is the modality that gives
the weights (in CWCL the pretrained, locked tower), V the other one; "u_to_v" is the softmax of one
u over all v.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NAMES = ("cwcl", "contrastive", "sigmoid", "supervised", "uniform", "cellclip", "astroclip")
WEIGHT_FUNCTIONS = (
    "affine",
    "centred",
    "uniform",
    "exp",
    "relu",
    "calibrated",
    "calibrated_relu",
    "labels",
)
DIRECTIONS = ("both", "u_to_v", "v_to_u")
WEIGHTED = ("u_to_v", "v_to_u", "both")
REDUCTIONS = ("sum", "mean")
FORMS = ("auto", "dense", "fused", "gathered", "ring")
DUPLICATES = ("negatives", "positives", "masked")
PRECISIONS = ("highest", "high", "default")
# Losses whose targets are given: the own pairs, or those that labels make equal.
WITHOUT_WEIGHTS = ("contrastive", "sigmoid")
# The weight functions whose tiled form passes a gradient on to p, and those without any p.
_WITH_WEIGHT_GRADIENT = ("affine", "centred")
_WITHOUT_P = ("uniform", "labels")

# What a preset decides. Every other field stays the caller's.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "supervised": {"weight_function": "labels", "weighted": "both"},
        "uniform": {"weight_function": "uniform"},
        "cellclip": {
            "weight_function": "affine",
            "weighted": "u_to_v",
            "reduction": "sum",
            "row_sum_epsilon": 1e-8,
            "detach_weights": False,
        },
        "astroclip": {
            "weight_function": "exp",
            "weighted": "u_to_v",
            "reduction": "mean",
            "detach_weights": True,
        },
    }
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of one experiment.

    Attributes:
      name: "cwcl", "contrastive" (CLIP, InfoNCE in both directions), "sigmoid" (SigLIP), or a
        preset: "supervised" (0/1 class weights), "uniform" (control without similarities),
        "cellclip", "astroclip".
      weights_from: the modality U whose similarities are the weights.
      weight_function: cosine -> weight. "affine" is the paper's cos/2 + 1/2; "centred" the same on
        cosines of mean-free embeds; "uniform" ignores the cosine; "exp" is
        exp((cos - 1) / weight_temperature); "relu" is max(cos, 0) ** weight_power; "calibrated"
        and "calibrated_relu" choose that temperature or power for every batch; "labels" is 1 for
        equal labels, else 0.
      weight_temperature: of "exp".
      weight_power: of "relu".
      weight_offdiagonal: of "uniform": the weight of every pair that is not a true one.
      target_diagonal: of the calibrated functions: the mean share of a row's target that its own
        pair gets, as far as duplicates that are positives too leave it.
      target_positives: of the calibrated functions, instead: the effective number of positives,
        exp(mean entropy); 0 leaves it to target_diagonal.
      weighted: the direction (or both) whose targets are weighted; the other keeps its own pair as
        the only target.
      direction: which softmax terms are in the loss.
      reduction: "sum" is L(u->v) + reverse_weight * L(v->u), the paper's; "mean" divides it by
        1 + reverse_weight.
      reverse_weight: the factor of L(v->u).
      row_sum_epsilon: added to the row sums of the weights before dividing.
      detach_weights: weights are constants for the gradient, as in the paper. If not, it also goes
        through them, in training to U's encoder where that trains (locked or precomputed features
        have none).
      duplicates: what equal labels mean: "negatives" (nothing), "positives" (weight 1), "masked"
        (left out of the softmax and of the targets).
      form: "auto", "dense" (the equations, N x N arrays), "fused" (tiled, one device), "gathered"
        or "ring" (over a mesh).
      block_size, block_columns: rows and columns of a tile; 0 chooses.
      precision: of float32 matrix products on accelerators. Lower ones are faster and lose digits
        that a high inverse temperature multiplies.
      sampled_rows: rows from which the calibration, and the entropy of closed-form weights, are
        estimated; batches up to this size are exact.
      diagnostics: also return entropies, accuracies and weights (else only the loss terms).
      debug_checks: check values on the host at every call: finite, normalised, weights
        non-negative with positive row sums. Slow.
    """

    name: str = "cwcl"
    weights_from: str = "image"
    weight_function: str = "affine"
    weight_temperature: float = 0.1
    weight_power: float = 2.0
    weight_offdiagonal: float = 1.0
    target_diagonal: float = 0.5
    target_positives: float = 0.0
    weighted: str = "u_to_v"
    direction: str = "both"
    reduction: str = "sum"
    reverse_weight: float = 1.0
    row_sum_epsilon: float = 0.0
    detach_weights: bool = True
    duplicates: str = "negatives"
    form: str = "auto"
    block_size: int = 0
    block_columns: int = 0
    precision: str = "highest"
    sampled_rows: int = 128
    diagnostics: bool = True
    debug_checks: bool = False

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            require_choice(field, getattr(self, field), allowed)
        for field in ("weight_temperature", "weight_power"):
            _require_positive(field, getattr(self, field))
        _require_range(self)


_CHOICES = {
    "name": NAMES,
    "weight_function": WEIGHT_FUNCTIONS,
    "weighted": WEIGHTED,
    "direction": DIRECTIONS,
    "reduction": REDUCTIONS,
    "duplicates": DUPLICATES,
    "form": FORMS,
    "precision": PRECISIONS,
}


def require_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not known; use one of {', '.join(allowed)}.")


def _require_positive(field: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{field}={value} must be positive and finite.")


def _require_range(config: LossConfig) -> None:
    if not 0 < config.target_diagonal < 1:
        raise ValueError(f"target_diagonal={config.target_diagonal} must lie between 0 and 1.")
    if config.target_positives != 0 and config.target_positives <= 1:
        raise ValueError(
            f"target_positives={config.target_positives} must be above 1 (or 0: calibrate by "
            "target_diagonal instead)."
        )
    for field in ("reverse_weight", "row_sum_epsilon", "weight_offdiagonal"):
        value = getattr(config, field)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{field}={value} must not be negative.")
    for field, least in (("block_size", 0), ("block_columns", 0), ("sampled_rows", 1)):
        if getattr(config, field) < least:
            raise ValueError(f"{field}={getattr(config, field)} must be at least {least}.")


def resolve(config: LossConfig) -> LossConfig:
    """Fills in what the preset of `config.name` decides.

    A field that was set to something else than both its default and the preset's value is an
    error: the result would no longer be the variant it is named after.
    """
    decided = PRESETS.get(config.name, {})
    defaults = {f.name: f.default for f in dataclasses.fields(LossConfig)}
    for field, value in decided.items():
        given = getattr(config, field)
        if given not in (defaults[field], value):
            raise ValueError(
                f"{field}={given!r} contradicts the preset {config.name!r}, which needs {value!r}; "
                "use name='cwcl' and set the fields one by one."
            )
    config = dataclasses.replace(config, **decided)
    if config.name == "contrastive":
        own = "labels" if config.duplicates == "positives" else config.weight_function
        config = dataclasses.replace(config, weighted="both", weight_function=own)
    return config


def check_weight_gradient(config: LossConfig, *, own: bool = False) -> None:
    """Raises where the gradient through the weights is asked for, but would silently be zero.

    Args:
      config: resolved options.
      own: whether the caller's own function takes the configured one's place.
    """
    if config.detach_weights or config.form == "dense" or config.name in WITHOUT_WEIGHTS:
        return
    kind, name = config.weight_function, "your own weight function"
    if not own:
        name = f"weight_function={kind!r}, duplicates={config.duplicates!r}"
        if kind in _WITHOUT_P or (
            kind in _WITH_WEIGHT_GRADIENT and config.duplicates == "negatives"
        ):
            return
    raise ValueError(
        f"detach_weights=False with {name} has no gradient of the weights in the tiled forms; set "
        "form='dense', or detach_weights=True as in the paper."
    )
