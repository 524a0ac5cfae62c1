"""What the files in configs/ share: options of their arguments with the same meaning in each.

    loss=NAME                 which loss: cwcl, contrastive (CL), cellclip, ...
    weights=NAME[NUMBER]      the similarity weights of loss=cwcl, see `losses.short_names`
    projection=trained|none   whether the side that gives the weights has a linear projection

What is locked is an encoder; a projection after it is a head, which trains. With
projection=trained the logits come from u = W p and the weights from p itself: the loss may distort
the locked space through W, while the weights stay those of p. With projection=none, u is p. The
section "The locked side's projection" of configs/README.md says which of the two is the paper's,
which is LiT's, and why it matters.
"""

import re
from collections.abc import Mapping
from typing import Any

from cwcl_jax.config import ConfigError
from cwcl_jax.losses.short_names import loss_fields

PROJECTIONS = ("trained", "none")


def experiment_name(base: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Returns `base` with all options that differ from their defaults, e.g. to name a run's folder.

    Two commands that differ in an argument of the config thus have different folders, and the order
    of the entries does not count: speech_cwcl-lock-both, lit_cwcl-loss-contrastive.
    """
    changed = [name for name in defaults if options[name] != defaults[name]]
    words = [name if options[name] is True else f"{name}-{options[name]}" for name in changed]
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in (base, *words))


def set_loss(config: Any, options: Mapping[str, Any]) -> None:
    """Sets the loss that `loss=` and `weights=` name.

    Raises:
      ConfigError: an unknown name, one that belongs to the other option, or weights with a loss
          that has none or its own.
    """
    loss, weights = options["loss"], options["weights"]
    if loss != "cwcl" and weights != "affine":
        raise ConfigError(
            f"weights={weights} is an option of loss=cwcl; loss={loss} has no weights or its own: "
            "leave one of them out"
        )
    word, value = ("weights", weights) if loss == "cwcl" else ("loss", loss)
    try:
        fields = loss_fields(value)
    except ValueError as error:
        raise ConfigError(f"{word}={value}: {error}") from error
    if (fields["name"] == "cwcl") != (word == "weights"):
        other = "weights" if word == "loss" else "loss"
        raise ConfigError(f"{word}={value}: this is a name for the other option: {other}={value}")
    if value == "affine":
        # cwcl's default, so that --config.loss.name=... stays possible
        del fields["weight_function"]
    config.loss.update(fields)


def set_projection(config: Any, modality: str, projection: str) -> None:
    """Sets the head of the side that gives the weights.

    If its encoder is locked, only the head trains.
    """
    require("projection", projection, PROJECTIONS)
    tower = config.towers[modality]
    tower.head = "linear" if projection == "trained" else "none"
    if tower.tune in ("none", "head"):
        tower.tune = "head" if projection == "trained" else "none"


def set_batch(config: Any, batch: int) -> None:
    """Sets the batch size; examples in total and in the warm-up stay, the learning rate scales."""
    factor = batch / config.global_batch_size
    config.global_batch_size = batch
    config.optimizer.learning_rate *= factor
    config.optimizer.warmup_steps = round(config.optimizer.warmup_steps / factor)
    config.total_steps = max(1, round(config.total_steps / factor))


def require(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError if an option's value is not one of the known ones."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(known)}")
