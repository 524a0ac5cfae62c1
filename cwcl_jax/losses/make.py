"""The public losses: functions of arrays, and `make_loss` for training code.

All of them return `(loss, diagnostics)`, the latter a flat dict of scalars.
"""

from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cwcl_jax.losses import checks
from cwcl_jax.losses.fused import Engine, OneDevice
from cwcl_jax.losses.options import LossConfig, resolve
from cwcl_jax.losses.pairwise import Inputs, dense_loss, weighted_loss
from cwcl_jax.losses.reference import Scalar, wide
from cwcl_jax.losses.sharded import Gathered, Ring
from cwcl_jax.losses.sigmoid import sigmoid_pairs
from cwcl_jax.losses.weights import WeightFunction

Diagnostics = dict[str, Array]

# Above this size of the gathered columns on one device, "auto" takes the ring.
_GATHERED_BYTES = 2**30


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
    weight_function: WeightFunction | None = None,
) -> LossFn:
    """Builds the loss of a configuration.

    Args:
      config: options.
      mesh: devices that the batch is split over; None, or a mesh with one part, is one device.
      axes: the mesh's axes that split the batch; those the mesh does not have are left out.
      weight_function: your own function (cosine, sharpness) -> weight, entry by entry, in place of
        the configured one.
    """
    config = resolve(config)
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    axes = tuple(a for a in axes if mesh is not None and a in mesh.axis_names)

    def loss_fn(u, v, p, logit_scale, logit_bias=None, labels=None, targets=None):
        checks.check_pair(u, v)
        common = jnp.promote_types(u.dtype, v.dtype)
        u, v = u.astype(common), v.astype(common)
        logit_scale = _scalar("logit_scale", logit_scale, u)
        engine = _engine(config, mesh, axes, u, p)
        inputs = _inputs(config, u, v, p, logit_scale, labels, targets)
        if config.name == "sigmoid":
            bias = _scalar("logit_bias", logit_bias, u)
            return sigmoid_pairs(config, inputs, bias, engine)
        if config.form == "dense":
            return dense_loss(config, inputs, weight_function)
        return weighted_loss(config, inputs, engine, weight_function)

    return loss_fn


def _scalar(name: str, value: Scalar | None, like: Array) -> Array:
    if value is None:
        raise ValueError(f"{name} is needed by this loss; pass a scalar.")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(wide(like))
    checks.check_scalar(name, value)
    return value.astype(wide(like))


def _inputs(config, u, v, p, logit_scale, labels, targets) -> Inputs:
    n = u.shape[0]
    if labels is not None:
        checks.check_labels(labels, n)
    if targets is not None:
        checks.check_targets(targets, n)
    elif p is not None:
        checks.check_weights_from(p, n)
    needs_labels = config.duplicates != "negatives" or config.weight_function == "labels"
    if needs_labels and labels is None:
        raise ValueError(
            f"labels are needed by weight_function={config.weight_function!r}, "
            f"duplicates={config.duplicates!r}; pass one integer for each pair."
        )
    needs_p = config.name not in ("contrastive", "sigmoid") and targets is None
    if needs_p and p is None and config.weight_function not in ("uniform", "labels"):
        raise ValueError(
            "weights_from is missing: pass the locked tower's embeds, whose similarities are the "
            "weights."
        )
    return Inputs(u, v, logit_scale, p, labels if needs_labels else None, targets)


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
    too_large = u.shape[0] * width * u.dtype.itemsize > _GATHERED_BYTES
    return Ring(mesh, axes) if too_large else gathered


def cwcl_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    weights_from: Array,
    logit_scale: Scalar,
    config: LossConfig | None = None,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
    **options,
) -> tuple[Float[Array, ""], Diagnostics]:
    """CWCL of pairs (u_i, v_i), weighted by the similarities of `weights_from`."""
    config = config or LossConfig(**options)
    return make_loss(config, mesh=mesh, axes=axes)(u, v, weights_from, logit_scale)


def contrastive_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
    **options,
) -> tuple[Float[Array, ""], Diagnostics]:
    """InfoNCE in both directions, CLIP's loss times two."""
    config = LossConfig(name="contrastive", **options)
    return make_loss(config, mesh=mesh, axes=axes)(u, v, None, logit_scale)


def sigmoid_loss(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
    **options,
) -> tuple[Float[Array, ""], Diagnostics]:
    """SigLIP's loss: every pair a binary classification, summed over candidates."""
    config = LossConfig(name="sigmoid", **options)
    return make_loss(config, mesh=mesh, axes=axes)(u, v, None, logit_scale, logit_bias)
