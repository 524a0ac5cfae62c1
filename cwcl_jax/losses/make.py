"""The public losses: functions of arrays, and `make_loss` for training code.

All of them return `(loss, diagnostics)`, the latter a flat dict of scalars.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cwcl_jax.losses import checks
from cwcl_jax.losses.fused import NO_FORWARD_MODE, Engine, OneDevice
from cwcl_jax.losses.options import WITHOUT_WEIGHTS, LossConfig, check_weight_gradient, resolve
from cwcl_jax.losses.pairwise import Inputs, dense_loss, weight_extremes, weighted_loss
from cwcl_jax.losses.reference import Scalar, wide
from cwcl_jax.losses.sharded import Gathered, Ring
from cwcl_jax.losses.sigmoid import sigmoid_pairs
from cwcl_jax.losses.weights import UserFunction

Diagnostics = dict[str, Array]

# Above this size of the gathered columns on one device, "auto" takes the ring.
GATHERED_BYTES = 2**30


@runtime_checkable
class LossFn(Protocol):
    """A loss of global arrays; inside one `jax.jit`, split over the mesh's axes on dimension 0."""

    def __call__(
        self,
        u: Float[Array, "n d"],
        v: Float[Array, "n d"],
        p: Array | None,
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
        labels: Int[Array, " n"] | None = None,
        targets: Float[Array, "n n"] | None = None,
    ) -> tuple[Float[Array, ""], Diagnostics]: ...


def make_loss(
    config: LossConfig,
    *,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
    weight_function: Callable[[Array], Array] | None = None,
) -> LossFn:
    """Builds the loss of a configuration.

    Args:
      config: options.
      mesh: devices that the batch is split over; None, or a mesh with one part, is one device.
        With explicit axes (the default of `jax.make_mesh`), differentiate it inside `jax.jit` or
        under `jax.set_mesh`.
      axes: the mesh's axes that split the batch; those the mesh does not have are left out.
      weight_function: your own function cosine -> weight, entry by entry, in place of the
        configured one.

    Raises:
      ValueError: options that contradict each other, or a mesh with none of `axes`.
    """
    config = resolve(config)
    function = None if weight_function is None else UserFunction(weight_function)
    if function is not None and config.name in WITHOUT_WEIGHTS:
        raise ValueError(f"name={config.name!r} has no weights; leave weight_function out.")
    check_weight_gradient(config, own=function is not None)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        return _of_explicit_mesh(config, mesh, axes, weight_function)
    axes = _splitting_axes(config, mesh, axes)

    def loss_fn(u, v, p, logit_scale, logit_bias=None, labels=None, targets=None):
        u, v, p, labels, targets = (_array(x) for x in (u, v, p, labels, targets))
        checks.check_pair(u, v)
        checks.check_not_explicit("u", u)
        common = jnp.promote_types(u.dtype, v.dtype)
        u, v = u.astype(common), v.astype(common)
        scale = _scalar("logit_scale", logit_scale, u)
        engine = _engine(config, mesh, axes, u, p)
        inputs = _inputs(config, u, v, p, scale, labels, targets, function)
        bias = _scalar("logit_bias", logit_bias, u) if config.name == "sigmoid" else None
        if config.debug_checks:
            _check_values(config, inputs, bias, function)
        return _evaluate(config, inputs, bias, engine, function)

    return loss_fn


def _of_explicit_mesh(config: LossConfig, mesh: Mesh, axes, weight_function) -> LossFn:
    """The loss over a mesh with explicit axes, the default of `jax.make_mesh`.

    Inside it the same devices have automatic axes: that a tile's operations would need shardings
    of their own is nothing to the caller.
    """
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    inner = make_loss(
        config,
        mesh=Mesh(mesh.devices, mesh.axis_names, axis_types=automatic),
        axes=axes,
        weight_function=weight_function,
    )
    mapped: Any = jax.sharding.auto_axes(inner, out_sharding=NamedSharding(mesh, P()))

    def loss_fn(u, v, p, logit_scale, logit_bias=None, labels=None, targets=None):
        return mapped(u, v, p, logit_scale, logit_bias, labels, targets)

    return loss_fn


def _splitting_axes(config: LossConfig, mesh: Mesh | None, axes) -> tuple[str, ...]:
    """The axes that the mesh has.

    Raises:
      ValueError: none, so that every device would silently be sent the whole batch.
    """
    if mesh is None:
        return ()
    wanted = (axes,) if isinstance(axes, str) else tuple(axes)
    found = tuple(axis for axis in wanted if axis in mesh.axis_names)
    if not found and mesh.size > 1 and config.form not in ("dense", "fused"):
        raise ValueError(
            f"the mesh has axes {tuple(mesh.axis_names)}, none of axes={wanted}: pass axes=, those "
            "that split the batch."
        )
    return found


def _array(x: Any) -> Any:
    """A JAX array of the types that are enabled: sums of numpy's float64 would warn in float32."""
    return None if x is None else jnp.asarray(x)


def _evaluate(config, inputs, bias, engine, function) -> tuple[Array, Diagnostics]:
    if config.form == "dense":
        if bias is not None:
            return sigmoid_pairs(config, inputs, bias, engine)
        return dense_loss(config, inputs, function)
    try:
        if bias is not None:
            return sigmoid_pairs(config, inputs, bias, engine)
        return weighted_loss(config, inputs, engine, function)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(NO_FORWARD_MODE) from error


def _check_values(config: LossConfig, inputs: Inputs, bias: Array | None, function) -> None:
    extremes = None
    if config.name not in WITHOUT_WEIGHTS:
        extremes = weight_extremes(config, inputs, function)
    arrays = {
        "u": inputs.u,
        "v": inputs.v,
        "weights_from": inputs.p,
        "logit_scale": inputs.logit_scale,
        "logit_bias": bias,
        "weights": extremes,
    }
    checks.check_values(arrays)


def _scalar(name: str, value: Scalar | None, like: Array) -> Array:
    if value is None:
        raise ValueError(f"{name} is needed by this loss; pass a scalar.")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(wide(like))
    checks.check_scalar(name, value)
    return value.astype(wide(like))


def _inputs(config, u, v, p, logit_scale, labels, targets, function) -> Inputs:
    n = u.shape[0]
    if labels is not None:
        checks.check_labels(labels, n)
    if targets is not None:
        _check_targets_are_used(config)
        checks.check_targets(targets, n)
    elif p is not None:
        checks.check_weights_from(p, n)
    by_labels = config.weight_function == "labels" and targets is None and function is None
    needs_labels = config.duplicates != "negatives" or by_labels
    if needs_labels and labels is None:
        raise ValueError(
            f"labels are needed by weight_function={config.weight_function!r}, "
            f"duplicates={config.duplicates!r}; pass one integer for each pair."
        )
    needs_p = config.name not in WITHOUT_WEIGHTS and targets is None
    without_p = config.weight_function in ("uniform", "labels") and function is None
    if needs_p and p is None and not without_p:
        raise ValueError(
            "weights_from is missing: pass the locked tower's embeds, whose similarities are the "
            "weights."
        )
    return Inputs(u, v, logit_scale, p, labels if needs_labels else None, targets)


def _check_targets_are_used(config: LossConfig) -> None:
    """Raises where the caller's weights, or the gradient through them, would silently get lost."""
    if config.name in WITHOUT_WEIGHTS:
        raise ValueError(f"name={config.name!r} has no weights; leave targets out.")
    if not config.detach_weights and config.form != "dense":
        raise ValueError(
            "detach_weights=False with targets has no gradient of the weights in the tiled forms; "
            "set form='dense', or detach_weights=True as in the paper."
        )


def _engine(config: LossConfig, mesh, axes: tuple[str, ...], u: Array, p) -> Engine:
    if not axes or config.form in ("dense", "fused"):
        if config.form in ("gathered", "ring") and not axes:
            raise ValueError(f"form={config.form!r} needs a mesh with one of the axes it splits.")
        return OneDevice()
    gathered = Gathered(mesh, axes)
    checks.check_divisible(u.shape[0], gathered.devices, axes)
    if config.form == "gathered":
        return gathered
    if config.form == "ring":
        return Ring(mesh, axes)
    if gathered.devices == 1:
        return OneDevice()
    width = u.shape[1] + (0 if p is None else p[0].size)
    too_large = u.shape[0] * width * u.dtype.itemsize > GATHERED_BYTES
    return Ring(mesh, axes) if too_large else gathered


def cwcl_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    weights_from: Array | None = None,
    weight_function: str | Callable[[Array], Array] = "",
    labels: Int[Array, " n"] | None = None,
    targets: Float[Array, "n n"] | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """CWCL of pairs (u_i, v_i), weighted by the similarities of `weights_from`.

    Args:
      u: embeds of the modality that gives the weights, rows of unit norm.
      v: embeds of the other modality.
      logit_scale: log of the inverse temperature.
      weights_from: embeds of the locked tower, of any width, rows of unit norm; or raw profiles
        (n, channels, features). No gradient goes here (see `LossConfig.detach_weights`).
      weight_function: a name of `LossConfig.weight_function`, or your own function of the cosine.
      labels: integers, for weights or duplicates that go by labels.
      targets: your own weights of all pairs, instead of `weights_from`; rows are normalised.
      config: all other options.
      mesh, axes: the devices that the rows are split over.

    Returns:
      The loss, and diagnostics as a flat dict of scalars. One pair alone has the loss 0, with
      gradients of 0: there is nothing to tell it from.
    """
    config = config or LossConfig()
    if config.name in WITHOUT_WEIGHTS:
        raise ValueError(
            f"config.name={config.name!r} has no weights; call {config.name}_loss instead."
        )
    own = None
    if callable(weight_function):
        own = weight_function
    elif weight_function:
        config = dataclasses.replace(config, weight_function=weight_function)
    loss_fn = make_loss(config, mesh=mesh, axes=axes, weight_function=own)
    return loss_fn(u, v, weights_from, logit_scale, labels=labels, targets=targets)


def contrastive_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    labels: Int[Array, " n"] | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """InfoNCE summed over both directions; CLIP's loss is its half (reduction="mean").

    Arguments as in `cwcl_loss`; labels only where `config.duplicates` uses them.
    """
    config = dataclasses.replace(config or LossConfig(), name="contrastive")
    return make_loss(config, mesh=mesh, axes=axes)(u, v, None, logit_scale, labels=labels)


def sigmoid_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    labels: Int[Array, " n"] | None = None,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
) -> tuple[Float[Array, ""], Diagnostics]:
    """SigLIP's loss: every pair is a binary decision; summed over candidates, mean over pairs.

    Arguments as in `contrastive_loss`; logit_bias is added to all logits (SigLIP starts at -10).
    """
    config = dataclasses.replace(config or LossConfig(), name="sigmoid")
    loss_fn = make_loss(config, mesh=mesh, axes=axes)
    return loss_fn(u, v, None, logit_scale, logit_bias, labels=labels)
