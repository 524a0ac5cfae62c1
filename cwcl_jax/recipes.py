"""What the files in configs/ share: words of their arguments that mean the same in each of them.

    loss=NAME                 which loss: cwcl, contrastive (CL), cellclip, ...
    weights=NAME[NUMBER]      the similarity weights of loss=cwcl, see `losses.short_names`
    projection=trained|none   whether the side that gives the weights has a linear projection

What is locked is an encoder; a projection above it is a head, which trains. With
projection=trained the logits come from u = W p and the weights from p itself: the loss may bend
the space that the weights are read from. With projection=none u is p. configs/README.md, "The
locked side's projection", says which of the two is the paper's, which is LiT's, why it matters.
"""

import re
from collections.abc import Mapping
from typing import Any

from cwcl_jax.config import ConfigError
from cwcl_jax.losses.short_names import loss_fields

PROJECTIONS = ("trained", "none")


def experiment_name(base: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """`base` and all options that differ from their defaults; by default it names the run's folder.

    So two commands that differ in an argument of the config have folders of their own, and the
    order of the entries does not count: speech_cwcl-lock-both, lit_cwcl-loss-contrastive.
    """
    changed = [name for name in defaults if options[name] != defaults[name]]
    words = [name if options[name] is True else f"{name}-{options[name]}" for name in changed]
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in (base, *words))


def set_loss(config: Any, options: Mapping[str, Any]) -> None:
    """The loss that `loss=` and `weights=` name.

    Raises:
      ConfigError: an unknown name, one that belongs to the other option, or weights beside a loss
        that has none or its own.
    """
    loss, weights = options["loss"], options["weights"]
    if loss != "cwcl" and weights != "affine":
        raise ConfigError(
            f"weights={weights} goes with loss=cwcl, and loss={loss} has no weights or its own: "
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
        del fields["weight_function"]  # cwcl's own: --config.loss.name=... then stays possible
    config.loss.update(fields)


def set_projection(config: Any, modality: str, projection: str) -> None:
    """The head of the side that gives the weights. Where its encoder is locked only this trains."""
    require("projection", projection, PROJECTIONS)
    tower = config.towers[modality]
    tower.head = "linear" if projection == "trained" else "none"
    if tower.tune in ("none", "head"):
        tower.tune = "head" if projection == "trained" else "none"


def set_batch(config: Any, batch: int) -> None:
    """Another batch: as many examples in all and in the warm-up, learning rate in proportion."""
    factor = batch / config.global_batch_size
    config.global_batch_size = batch
    config.optimizer.learning_rate *= factor
    config.optimizer.warmup_steps = round(config.optimizer.warmup_steps / factor)
    config.total_steps = max(1, round(config.total_steps / factor))


def require(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError for an option's value that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(known)}")
