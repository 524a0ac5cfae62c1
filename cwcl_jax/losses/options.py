"""The options of a loss as one frozen dataclass, and the `Frame` that they resolve to.

The equations, and the published losses as rows of one table, are in `cwcl_jax.losses.presets`. U is
the modality that gives the weights (in CWCL the pretrained, locked tower), V is the other one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from cwcl_jax.extension import import_named
from cwcl_jax.losses.presets import PRESETS, TERMS, Preset
from cwcl_jax.losses.weights import Weights, parse_number, parse_weights
from cwcl_jax.precision import PRECISIONS

_CHOICES = {
    "weighted": ("", "u_to_v", "v_to_u", "both", "own"),
    "form": ("auto", "dense", "fused", "gathered", "ring"),
    "precision": (*PRECISIONS, "bfloat16"),
}
# How other pairs that count as the same are treated; the last two take a margin as suffix.
DUPLICATES = ("negatives", "positives", "masked", "absolute", "relative")
# Options that the preset sets unless they are given.
_OF_PRESETS = (
    "weight_function",
    "weighted",
    "duplicates",
    "mix",
    "direction_weights",
    "terms",
    "detach_weights",
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of one experiment. Empty options take the preset's values.

    Attributes:
      name: a row of `presets.PRESETS`, or "module:name", a function of your own (see
          `make.own_loss`).
      weights_from: the modality U whose similarities are the weights.
      weight_function: similarity -> weight, by name and number: "affine", the paper's cos/2 + 1/2;
          "centred", the same on cosines of mean-free features; "uniform0.5", a constant weight of
          any other pair, without similarities; "exp0.1", exp((cos - 1) / 0.1); "relu2", max(cos, 0)
          ** 2; "calibrated0.5" and "calibrated_relu0.5", exp and relu whose temperature or power is
          chosen in every batch so that positive pairs have that mean share of the target (a number
          above 1 is the effective number of positives); "labels0.5", 1 for equal labels, 0.5 for
          label sets that overlap, else 0; "distance0.3_0.75", 1 - 4/pi atan(d^2 / 0.3) of
          unnormalised features, 0 below 0.75. Or "module:name", your own elementwise function of
          the cosine.
      weighted: the directions whose targets are weighted, "u_to_v", "v_to_u" or "both"; "own"
          weights both, each by its own modality's similarities.
      duplicates: how different pairs with the same content are treated: "negatives" (no special
          treatment); by equal labels as "positives" (weight 1) or "masked" (left out of softmax and
          targets); left out where the locked tower finds them too similar, "absolute0.05" or
          "relative0.05".
      mix: share of the target that goes to the positive pair in addition to its weight: one number,
          or several, spread evenly over the run with linear interpolation.
      direction_weights: factors of the losses U->V and V->U; (1, 1) is the paper's sum, (0.5, 0.5)
          CLIP's mean.
      terms: further terms, "name=factor"; they replace the preset's.
      detach_weights: whether weights are constants for the gradient, as in the paper. If not, the
          gradient also flows through them, and in training into the encoder if that is trained.
      form: "auto", "dense" (the equations, N x N arrays), "fused" (tiled, one device), "gathered"
          or "ring" (over a mesh).
      block_size, block_columns: rows and columns of a tile; 0 chooses automatically.
      precision: of the products of float32 embeddings. "highest" is float32 everywhere. On
          accelerators, "high" uses three passes of the tensor cores and "default" one (TF32 on
          GPUs, bfloat16 on TPUs). "bfloat16" rounds the embeddings for the products and sums in
          float32, on any device. Lower precisions are faster, but their rounding errors are
          multiplied by the inverse temperature; see `cwcl_jax.precision`.
      diagnostics: also return entropies, accuracies and weights (otherwise only the parts of the
          loss).
      debug_checks: check values on the host at every call: finite, normalised, weights non-negative
          with positive row sums. Slow.
    """

    name: str = "cwcl"
    weights_from: str = "image"
    weight_function: str = ""
    weighted: str = ""
    duplicates: str = ""
    mix: tuple[float, ...] = ()
    direction_weights: tuple[float, ...] = ()
    terms: tuple[str, ...] = ()
    detach_weights: bool | None = None
    form: str = "auto"
    block_size: int = 0
    block_columns: int = 0
    precision: str = "highest"
    diagnostics: bool = True
    debug_checks: bool = False

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            require_choice(field, getattr(self, field), allowed)
        for field in ("block_size", "block_columns"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0.")
        resolve(self)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A resolved configuration, as the forms of the loss read it.

    Attributes:
      config: the options that it was resolved from.
      kind, weighted, mix, direction_weights, detach_weights, row_sum_epsilon, negatives: see
          `Preset`.
      weights: the weight function.
      duplicates, margin: see `LossConfig.duplicates`.
      terms: factors by name.
    """

    config: LossConfig
    kind: str
    weights: Weights
    weighted: str
    duplicates: str
    margin: float
    mix: tuple[float, ...]
    direction_weights: tuple[float, ...]
    terms: dict[str, float]
    detach_weights: bool
    row_sum_epsilon: float
    negatives: tuple[float, float]

    @property
    def needs_bias(self) -> bool:
        """Whether the logits have a bias."""
        return self.kind == "sigmoid"

    @property
    def needs_labels(self) -> bool:
        """Whether any part of the loss reads labels."""
        by_labels = self.weights.name == "labels" or self.duplicates in ("positives", "masked")
        return by_labels or "replicates" in self.terms

    @property
    def guided(self) -> bool:
        """Whether pairs are masked by the locked tower's similarities."""
        return self.duplicates in ("absolute", "relative")

    @property
    def needs_p(self) -> bool:
        """Whether the features of U are read."""
        return self.weights.of_features or self.guided

    @property
    def needs_q(self) -> bool:
        """Whether the features of V are read."""
        return self.weighted == "own"

    @property
    def raw_features(self) -> bool:
        """Whether the features are used without normalisation."""
        return self.weights.name == "distance"

    @property
    def needs_progress(self) -> bool:
        """Whether the loss changes over the run."""
        return len(self.mix) > 1

    @property
    def closed(self) -> bool:
        """Whether the weights are affine in the cosine, so that no tiles of weights are needed."""
        return (
            self.kind == "softmax"
            and self.weights.name in ("affine", "centred", "uniform")
            and self.duplicates == "negatives"
            and not self.terms.get("negatives")
        )


def require_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`."""
    if value not in allowed:
        known = ", ".join(x if x else repr(x) for x in allowed)
        raise ValueError(f"{field}={value!r} is not known; use one of {known}.")


def is_own(name: str) -> bool:
    """Returns whether a name refers to a function outside the package."""
    return ":" in name


def needs_bias(config: LossConfig) -> bool:
    """Returns whether the loss adds a trained bias to its logits."""
    if is_own(config.name):
        from cwcl_jax.losses.make import argument_names

        return "logit_bias" in argument_names(import_named(config.name, "loss"))
    return resolve(config).needs_bias


def resolve(config: LossConfig, function: Callable | None = None) -> Frame:
    """Returns the frame: the preset of `config.name` with the given options applied.

    Args:
      config: the options.
      function: the caller's own weight function, instead of the configured one.

    Raises:
      ValueError: an unknown name, an option that would make it a different loss, or one without
          effect.
    """
    if is_own(config.name):
        return _frame_of_own_loss(config, function)
    require_choice("name", config.name, tuple(PRESETS))
    preset = PRESETS[config.name]
    if function is not None and "weight_function" not in preset.open:
        raise ValueError(_not_open("weight_function", "your own function", config.name, preset))
    given = {name: getattr(config, name) for name in _OF_PRESETS}
    given = {name: value for name, value in given.items() if value not in ("", (), None)}
    for name, value in given.items():
        if name not in preset.open and value != getattr(preset, name):
            raise ValueError(_not_open(name, value, config.name, preset))
    chosen = dataclasses.replace(preset, **given)
    duplicates, margin = _parse_duplicates(chosen.duplicates)
    text = chosen.weight_function
    if text == "identity" and duplicates == "positives":
        text = "labels"
    frame = Frame(
        config=config,
        kind=chosen.kind,
        weights=parse_weights(text, function),
        weighted=chosen.weighted,
        duplicates=duplicates,
        margin=margin,
        mix=_checked_mix(chosen.mix),
        direction_weights=_checked_directions(chosen.direction_weights),
        terms=_parse_terms(chosen.terms),
        detach_weights=chosen.detach_weights,
        row_sum_epsilon=chosen.row_sum_epsilon,
        negatives=chosen.negatives,
    )
    _check_frame(frame, given)
    return frame


def _frame_of_own_loss(config: LossConfig, function: Callable | None) -> Frame:
    set_ = [name for name in _OF_PRESETS if getattr(config, name) not in ("", (), None)]
    if set_ or function is not None:
        raise ValueError(
            f"name={config.name!r} is your own loss, which does not read "
            f"{(set_ or ['weight_function'])[0]}: leave that out."
        )
    from cwcl_jax.losses.make import own_loss

    own_loss(import_named(config.name, "loss"), config.name)  # raises if it is not a valid loss
    return Frame(
        config, "own", parse_weights("identity"), "both", "negatives", 0.0, (0.0,), (1.0, 1.0), {},
        detach_weights=True, row_sum_epsilon=0.0, negatives=(1.0, 1.0),
    )  # fmt: skip


def _not_open(option: str, value: Any, name: str, preset: Preset) -> str:
    able = [other for other, x in PRESETS.items() if option in x.open]
    return (
        f"{option}={value!r} contradicts the preset {name!r}, which sets "
        f"{getattr(preset, option)!r}; leave it out, or use a name that takes it: "
        f"{', '.join(able)}."
    )


def _parse_duplicates(text: str) -> tuple[str, float]:
    name, numbers = parse_number(text)
    require_choice("duplicates", name, DUPLICATES)
    if name in ("absolute", "relative"):
        if len(numbers) != 1 or not 0 <= numbers[0] < 1:
            raise ValueError(f"duplicates={text!r} needs one margin in [0, 1), as {name}0.05.")
        return name, numbers[0]
    if numbers:
        raise ValueError(f"duplicates={text!r} takes no number.")
    return name, 0.0


def _parse_terms(entries: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        require_choice("terms", name, TERMS)
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not (factor >= 0 and math.isfinite(factor)) or name in found:
            raise ValueError(f"terms={entry!r}: write each once, as '{name}=0.5', not negative.")
        found[name] = factor
    return {name: factor for name, factor in found.items() if factor}


def _checked_mix(mix: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= share <= 1 for share in mix):
        raise ValueError(f"mix={mix} must lie between 0 and 1.")
    return tuple(mix)


def _checked_directions(factors: tuple[float, ...]) -> tuple[float, ...]:
    if (
        len(factors) != 2
        or not all(x >= 0 and math.isfinite(x) for x in factors)
        or not any(factors)
    ):
        raise ValueError(
            f"direction_weights={factors} must be two factors, of U->V and V->U, not negative and "
            "not both 0."
        )
    return tuple(factors)


def _check_frame(frame: Frame, given: dict[str, Any]) -> None:
    """Raises ValueError if a given option would have no effect."""
    weights, name = frame.weights, frame.config.name
    if frame.weighted == "own" and not weights.of_features:
        raise ValueError(
            f"weighted='own' with weight_function={weights.text!r}, which uses no similarities of "
            "features; use weighted='both'."
        )
    if "detach_weights" in given and not weights.of_features:
        raise ValueError(
            f"detach_weights has no effect with weight_function={weights.text!r}, which reads no "
            "features; leave it out."
        )
    if "negatives" in frame.terms and (frame.kind != "softmax" or weights.name == "identity"):
        raise ValueError(
            f"terms='negatives' of {name!r}: its negatives have no targets; use softclip or cwcl."
        )
    if frame.guided and (weights.calibrated or weights.name == "distance"):
        raise ValueError(
            f"duplicates={frame.duplicates!r} cannot be combined with "
            f"weight_function={weights.text!r}; change one of the two."
        )
    if frame.kind == "none" and not frame.terms:
        raise ValueError(f"name={name!r} computes no loss; set terms, as in 'cosine=1'.")
    given_twice = frame.duplicates == "positives" and "weight_function" in PRESETS[name].open
    if given_twice and weights.name == "labels":
        raise ValueError(
            "duplicates='positives' has no effect with weight_function='labels': equal labels "
            "already have weight 1; leave it out."
        )
    check_weight_gradient(frame)


def check_weight_gradient(frame: Frame) -> None:
    """Raises ValueError if a requested gradient through the weights would silently be zero."""
    if frame.detach_weights or frame.config.form == "dense" or frame.closed:
        return
    raise ValueError(
        f"detach_weights=False with weight_function={frame.weights.text!r}, "
        f"duplicates={frame.duplicates!r} has no gradient of the weights in the tiled forms; set "
        "form='dense', or detach_weights=True as in the paper."
    )
