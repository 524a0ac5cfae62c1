"""The losses as functions of arrays. Each returns `(loss, diagnostics)`: a scalar and a dict."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cwcl_jax.losses.labels import exact_labels
from cwcl_jax.losses.make import Diagnostics, make_loss
from cwcl_jax.losses.numerics import Scalar
from cwcl_jax.losses.options import LossConfig, resolve

Axes = str | Sequence[str]


def cwcl_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    weights_from: Array | None = None,
    weight_function: str | Callable[[Array], Array] = "",
    labels: Array | np.ndarray | None = None,
    targets: Float[Array, "n n"] | None = None,
    v_weights_from: Array | None = None,
    logit_bias: Scalar | None = None,
    progress: Scalar | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: Axes = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """Returns the CWCL loss of pairs (u_i, v_i), weighted by the similarities of `weights_from`.

    With `config`, this function computes any other loss of `cwcl_jax.losses.presets` that needs
    only these arrays.

    Args:
      u: embeddings of the modality that gives the weights, (n, d), rows of unit norm.
      v: embeddings of the other modality, (n, d), rows of unit norm.
      logit_scale: log of the inverse temperature.
      weights_from: features of the locked tower, (n, k) with any k. Rows must have unit norm,
          except for distance weights, which use the features unchanged. Raw profiles of shape (n,
          channels, features) also work. No gradient flows into this array by default (see
          `LossConfig.detach_weights`).
      weight_function: as `LossConfig.weight_function`, or your own function of the cosine.
      labels: integers (n,), or sets of integers (n, k) padded with -1, for weights or duplicates
          that are defined by labels.
      targets: your own weights of all pairs, (n, n), instead of `weights_from`. Rows are
          normalised.
      v_weights_from: features of V, where the config has weighted="own".
      logit_bias: bias of the sigmoid losses.
      progress: fraction of the run that is done, needed where the config's `mix` changes over the
          run.
      config: all other options.
      mesh, axes: the devices that the rows are split over.

    Returns:
      The loss and the diagnostics. A batch of one pair has loss 0 and zero gradients, because it
      has no negatives.

    Raises:
      ValueError: an argument is missing, or an argument would have no effect. Outside of
          `jax.jit`, where values are known, also rows of `u`, `v` or `weights_from` that must have
          unit norm and have another one or NaN, and a `logit_scale` so large that it must be the
          inverse temperature itself. (tau itself, such as 0.07, cannot be told from a log.)
    """
    config, numbers = config or LossConfig(), exact_labels(labels)
    own = weight_function if callable(weight_function) else None
    if isinstance(weight_function, str) and weight_function:
        config = dataclasses.replace(config, weight_function=weight_function)
    frame = resolve(config, own)
    if targets is not None and (weight_function or config.weight_function):
        raise ValueError("targets replace weight_function; leave one of them out.")
    by_labels = frame.needs_labels
    read = {
        "weights_from": (weights_from, frame.guided or (frame.needs_p and targets is None)),
        "v_weights_from": (v_weights_from, frame.needs_q),
        "labels": (labels, by_labels),
        "logit_bias": (logit_bias, frame.needs_bias),
        "progress": (progress, frame.needs_progress),
    }
    refuse_unread(frame.config.name, read)
    features = {"weights_from": weights_from, "v_weights_from": v_weights_from}
    _check_values({"u": u, "v": v} | ({} if frame.raw_features else features), logit_scale)
    loss_fn = make_loss(config, mesh=mesh, axes=axes, weight_function=own)
    return loss_fn(
        u, v, weights_from, logit_scale, logit_bias, numbers, targets, v_weights_from, progress
    )


# Rows looked at, the deviation that bfloat16 stays below, and the largest sensible 1 / tau.
_ROWS, _DEVIATION, _LARGEST = 64, 0.05, 1e4


def _check_values(embeds: Mapping[str, Any], logit_scale: Scalar) -> None:
    """Raises ValueError for values that would give a wrong loss; tracers, without values, pass.

    Args:
      embeds: name -> rows that must have unit norm. None and raw profiles (rank 3) are left out.
    """
    for name, rows in embeds.items():
        if isinstance(rows, Tracer) or not getattr(rows, "is_fully_addressable", True):
            continue
        if np.ndim(rows) != 2:  # the loss itself checks shapes
            continue
        norms = np.linalg.norm(np.asarray(rows[:_ROWS], np.float32), axis=-1)
        far = ~(np.abs(norms - 1) <= _DEVIATION)  # NaN is far, too
        if far.any():
            raise ValueError(
                f"row {np.argmax(far)} of {name} has norm {norms[far][0]:.3g}; rows must have unit "
                f"norm: divide {name} by its norms, along the last axis."
            )
    scalar = np.ndim(logit_scale) == 0 and not isinstance(logit_scale, Tracer)
    if scalar and float(logit_scale) > np.log(_LARGEST):
        raise ValueError(
            f"logit_scale={float(logit_scale):.4g} is the log of 1 / tau; for an inverse "
            f"temperature of {float(logit_scale):.4g} give its log."
        )


def refuse_unread(name: str, read: dict[str, tuple[object, bool]]) -> None:
    """Raises ValueError if an argument was given that the loss does not read."""
    for argument, (value, used) in read.items():
        if value is not None and not used:
            raise ValueError(
                f"{argument} has no effect with name={name!r} and these options; leave it out, or "
                "choose a name, weight_function or duplicates that reads it."
            )


def contrastive_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    labels: Array | np.ndarray | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: Axes = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """Returns the InfoNCE loss, summed over both directions.

    CLIP's loss is half of it: direction_weights=(0.5, 0.5). Arguments are as in `cwcl_loss`;
    `labels` are read only if `config.duplicates` uses them.
    """
    config = dataclasses.replace(config or LossConfig(), name="contrastive")
    return cwcl_loss(
        u, v, logit_scale=logit_scale, labels=labels, config=config, mesh=mesh, axes=axes
    )


def sigmoid_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    labels: Array | np.ndarray | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: Axes = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """Returns SigLIP's loss: each pair is a binary decision.

    The loss is summed over candidates and averaged over pairs. Arguments are as in
    `contrastive_loss`; `logit_bias` is added to all logits (SigLIP starts at -10).
    """
    config = dataclasses.replace(config or LossConfig(), name="sigmoid")
    return cwcl_loss(
        u,
        v,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        labels=labels,
        config=config,
        mesh=mesh,
        axes=axes,
    )
