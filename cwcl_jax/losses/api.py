"""The losses as functions of arrays. All return `(loss, diagnostics)`, a flat dict of scalars."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
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
    """CWCL of pairs (u_i, v_i), weighted by the similarities of `weights_from`.

    With `config` any other loss of `cwcl_jax.losses.presets` that reads these arrays.

    Args:
      u: embeds of the modality that gives the weights, rows of unit norm.
      v: embeds of the other modality.
      logit_scale: log of the inverse temperature.
      weights_from: features of the locked tower, of any width, rows of unit norm (as they are for
        weights of distances); or raw profiles (n, channels, features). No gradient goes here (see
        `LossConfig.detach_weights`).
      weight_function: as `LossConfig.weight_function`, or your own function of the cosine.
      labels: integers (n,), or sets of them (n, k) filled up with -1, for weights or duplicates
        that go by labels.
      targets: your own weights of all pairs, instead of `weights_from`; rows are normalised.
      v_weights_from: V's own features, where the config has weighted="own".
      logit_bias: of the sigmoid losses.
      progress: share of the run that is done, where the config's `mix` changes over it.
      config: all other options.
      mesh, axes: the devices that the rows are split over.

    Returns:
      The loss, and diagnostics. One pair alone has the loss 0, with gradients of 0: there is
      nothing to tell it from.

    Raises:
      ValueError: an argument is missing, or would do nothing.
    """
    config, numbers = config or LossConfig(), exact_labels(labels)
    own = weight_function if callable(weight_function) else None
    if isinstance(weight_function, str) and weight_function:
        config = dataclasses.replace(config, weight_function=weight_function)
    frame = resolve(config, own)
    if targets is not None and (weight_function or config.weight_function):
        raise ValueError("weight_function does nothing beside targets; leave one of them out.")
    by_labels = frame.needs_labels
    read = {
        "weights_from": (weights_from, frame.guided or (frame.needs_p and targets is None)),
        "v_weights_from": (v_weights_from, frame.needs_q),
        "labels": (labels, by_labels),
        "logit_bias": (logit_bias, frame.needs_bias),
        "progress": (progress, frame.needs_progress),
    }
    refuse_unread(frame.config.name, read)
    loss_fn = make_loss(config, mesh=mesh, axes=axes, weight_function=own)
    return loss_fn(
        u, v, weights_from, logit_scale, logit_bias, numbers, targets, v_weights_from, progress
    )


def refuse_unread(name: str, read: dict[str, tuple[object, bool]]) -> None:
    """Raises where an argument was given that the loss does not read."""
    for argument, (value, used) in read.items():
        if value is not None and not used:
            raise ValueError(
                f"{argument} does nothing in name={name!r} with these options; leave it out, or "
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
    """InfoNCE summed over both directions; CLIP's loss is its half (direction_weights=(0.5, 0.5)).

    Arguments as in `cwcl_loss`; labels only where `config.duplicates` uses them.
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
    """SigLIP's loss: every pair is a binary decision; summed over candidates, mean over pairs.

    Arguments as in `contrastive_loss`; logit_bias is added to all logits (SigLIP starts at -10).
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
