"""`make_loss` for training code: turns a configuration into a function of arrays."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cwcl_jax.extension import import_named
from cwcl_jax.losses import checks
from cwcl_jax.losses.engines import Engine, OneDevice
from cwcl_jax.losses.fused import NO_FORWARD_MODE
from cwcl_jax.losses.inputs import Inputs
from cwcl_jax.losses.labels import label_sets
from cwcl_jax.losses.numerics import Scalar, wide
from cwcl_jax.losses.options import Frame, LossConfig, is_own, resolve
from cwcl_jax.losses.pairwise import loss_of_frame, weight_extremes
from cwcl_jax.losses.sharded import Gathered, Ring
from cwcl_jax.losses.weights import with_constant_parameters

Diagnostics = dict[str, Array]

# If the gathered columns take more bytes than this on one device, "auto" selects the ring.
GATHERED_BYTES = 2**30


@runtime_checkable
class LossFn(Protocol):
    """A loss of global arrays, to be called inside one `jax.jit`.

    Arrays may be split over the mesh's axes on dimension 0.

    Args:
      u, v: embeddings of both modalities, rows of unit norm.
      p: features of U that define weights and masks. Rows have unit norm, except for distances.
      logit_scale: log of the inverse temperature.
      logit_bias: bias of sigmoid losses.
      labels: (n,) integers, or (n, k) sets of integers, padded with -1.
      targets: weights of all pairs, (n, n), instead of the weight function's.
      q: features of V, where weighted="own".
      progress: fraction of the run that is done, for options that change over the run.

    Returns:
      The loss, and the diagnostics as a flat dict of scalars.
    """

    def __call__(
        self,
        u: Float[Array, "n d"],
        v: Float[Array, "n d"],
        p: Array | None,
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
        labels: Array | None = None,
        targets: Float[Array, "n n"] | None = None,
        q: Array | None = None,
        progress: Scalar | None = None,
    ) -> tuple[Float[Array, ""], Diagnostics]: ...


_ARGUMENTS = ("u", "v", "p", "logit_scale", "logit_bias", "labels", "targets", "q", "progress")


def make_loss(
    config: LossConfig,
    *,
    mesh: Mesh | None = None,
    axes: str | Sequence[str] = ("data", "fsdp"),
    weight_function: Callable[[Array], Array] | None = None,
) -> LossFn:
    """Returns the loss function of a configuration.

    Args:
      config: options.
      mesh: devices that the batch is split over. None, or a mesh that splits the batch into one
          part, runs on one device. With explicit axes (the default of `jax.make_mesh`),
          differentiate the loss inside `jax.jit` or under `jax.set_mesh`.
      axes: the mesh axes that split the batch. Axes that the mesh does not have are ignored.
      weight_function: your own elementwise function cosine -> weight, instead of the configured
          one.

    Raises:
      ValueError: options contradict each other, or the mesh has none of `axes`.
    """
    frame = resolve(config, weight_function)
    if is_own(config.name):
        return own_loss(import_named(config.name, "loss"), config.name)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        return _of_explicit_mesh(config, mesh, axes, weight_function)
    axes = _splitting_axes(config, mesh, axes)

    def loss_fn(
        u, v, p, logit_scale, logit_bias=None, labels=None, targets=None, q=None, progress=None
    ):
        u, v, p, labels, targets, q = (_array(x) for x in (u, v, p, labels, targets, q))
        checks.check_pair(u, v)
        checks.check_not_explicit("u", u)
        common = jnp.promote_types(u.dtype, v.dtype)
        u, v = u.astype(common), v.astype(common)
        engine = _engine(config, mesh, axes, u, p)
        inputs = Inputs(
            u,
            v,
            _scalar("logit_scale", logit_scale, u),
            mix=_mix(frame, progress, u),
            logit_bias=_scalar("logit_bias", logit_bias, u) if frame.needs_bias else None,
            **_features_and_labels(frame, u.shape[0], p, q, labels, targets),
        )
        if config.debug_checks:
            _check_values(frame, inputs)
        try:
            return loss_of_frame(_with_constants(frame, wide(u)), inputs, engine)
        except TypeError as error:
            if config.form == "dense" or "forward-mode" not in str(error):
                raise
            raise TypeError(NO_FORWARD_MODE) from error

    if not axes or config.form in ("dense", "fused"):
        return loss_fn
    # On a mesh the loss is always compiled, because parts of `shard_map` do not run eagerly.
    if weight_function is None:
        return jax.jit(loss_fn)
    # Compiled again for each call: the user's function may close over values being traced right
    # now.
    return lambda *arguments, **named: jax.jit(partial(loss_fn))(*arguments, **named)


def _with_constants(frame: Frame, dtype: jnp.dtype) -> Frame:
    """Returns the frame with constant weight parameters, as tiles cannot differentiate them."""
    own = frame.weights.own
    if own is None or frame.config.form == "dense":
        return frame
    own = with_constant_parameters(own, dtype)
    return dataclasses.replace(frame, weights=dataclasses.replace(frame.weights, own=own))


def own_loss(function: Any, name: str) -> LossFn:
    """Returns a `LossFn` that calls a user's own function.

    The function may take any of u, v, p, logit_scale, logit_bias, labels, q and progress by these
    names, as global arrays like those of `LossFn`. It returns a scalar, or a scalar and a dict of
    scalars.

    Raises:
      ValueError: it is not a function, or it requires an argument of another name.
    """
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"loss {name!r} is a {type(function).__name__}, not a function.")
    call: Callable[..., Any] = function
    wanted = argument_names(function)
    unknown = [argument for argument in wanted if argument not in _ARGUMENTS]
    if unknown:
        raise ValueError(
            f"{name!r} takes an argument {unknown[0]!r}; the arguments of a loss are "
            f"{', '.join(_ARGUMENTS)}."
        )

    def loss_fn(
        u, v, p, logit_scale, logit_bias=None, labels=None, targets=None, q=None, progress=None
    ):
        given = (u, v, p, logit_scale, logit_bias, labels, targets, q, progress)
        values: dict[str, Any] = dict(zip(_ARGUMENTS, given, strict=True))
        result = call(**{argument: values[argument] for argument in wanted})
        loss, reported = result if isinstance(result, tuple) else (result, {})
        if jnp.shape(loss) != ():
            raise ValueError(f"{name!r} must return a scalar, got shape {jnp.shape(loss)}.")
        scale = jnp.exp(jnp.asarray(logit_scale))
        out = {"loss": loss, "inverse_temperature": scale} | dict(reported)
        return loss, jax.tree.map(jax.lax.stop_gradient, out)

    return loss_fn


def argument_names(function: Callable) -> list[str]:
    """Returns the names of a function's arguments, without unknown ones that have defaults."""
    parameters = inspect.signature(function).parameters.values()
    return [x.name for x in parameters if x.name in _ARGUMENTS or x.default is x.empty]


def _of_explicit_mesh(config: LossConfig, mesh: Mesh, axes, weight_function) -> LossFn:
    """Returns the loss for a mesh with explicit axes, the default of `jax.make_mesh`.

    Inside the loss, the same devices get automatic axes, so that the caller need not state
    shardings for the operations of each tile.
    """
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    inner = make_loss(
        config,
        mesh=Mesh(mesh.devices, mesh.axis_names, axis_types=automatic),
        axes=axes,
        weight_function=weight_function,
    )
    mapped: Any = jax.sharding.auto_axes(inner, out_sharding=NamedSharding(mesh, P()))

    def loss_fn(
        u, v, p, logit_scale, logit_bias=None, labels=None, targets=None, q=None, progress=None
    ):
        return mapped(u, v, p, logit_scale, logit_bias, labels, targets, q, progress)

    return loss_fn


def _splitting_axes(config: LossConfig, mesh: Mesh | None, axes) -> tuple[str, ...]:
    """Returns those of `axes` that the mesh has.

    Raises:
      ValueError: the mesh has none of them; every device would silently receive the whole batch.
    """
    if mesh is None:
        return ()
    wanted = (axes,) if isinstance(axes, str) else tuple(axes)
    found = tuple(axis for axis in wanted if axis in mesh.axis_names)
    if not found and mesh.size > 1 and config.form not in ("dense", "fused"):
        raise ValueError(
            f"the mesh has axes {tuple(mesh.axis_names)}, none of which is in axes={wanted}: pass "
            "axes=, the mesh axes that split the batch."
        )
    return found


def _array(x: Any) -> Any:
    """Returns a JAX array of an enabled dtype: sums of numpy float64 would warn in float32."""
    return None if x is None else jnp.asarray(x)


def _mix(frame: Frame, progress: Scalar | None, like: Array) -> Any:
    """Returns the positive pair's share of the target at this point of the run."""
    if not frame.needs_progress:
        return frame.mix[0]
    if progress is None:
        raise ValueError(
            f"progress is needed by mix={frame.mix}; pass the fraction of the run, from 0 to 1."
        )
    shares = jnp.asarray(frame.mix, wide(like))
    return jnp.interp(jnp.asarray(progress, wide(like)), jnp.linspace(0, 1, len(shares)), shares)


def _check_values(frame: Frame, inputs: Inputs) -> None:
    arrays = {
        "u": inputs.u,
        "v": inputs.v,
        "weights_from": None if frame.raw_features else inputs.p,
        "logit_scale": inputs.logit_scale,
        "logit_bias": inputs.logit_bias,
        "weights": weight_extremes(frame, inputs),
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


def _features_and_labels(frame: Frame, n: int, p, q, labels, targets) -> dict[str, Any]:
    """Returns the checked arrays that the frame reads, and None for those it does not read.

    Training code passes all arrays; only the needed ones are checked and kept.
    """
    name = frame.config.name
    if targets is not None:
        _check_targets_are_used(frame)
        checks.check_targets(targets, n)
        labels_needed = frame.duplicates in ("positives", "masked") or "replicates" in frame.terms
    else:
        labels_needed = frame.needs_labels
    if labels_needed:
        if labels is None:
            raise ValueError(
                f"labels are needed by name={name!r}, weight_function={frame.weights.text!r}, "
                f"duplicates={frame.duplicates!r}; pass one integer (or set) for each pair."
            )
        checks.check_labels(labels, n)
        labels = label_sets(labels) if labels.ndim == 2 else labels
    needed = {"p": frame.needs_p and (targets is None or frame.guided), "q": frame.needs_q}
    for key, array in (("p", p), ("q", q)):
        if needed[key] and array is None:
            raise ValueError(_missing(frame, key))
        if needed[key]:
            checks.check_weights_from(array, n)
    return {
        "p": p if needed["p"] else None,
        "q": q if needed["q"] else None,
        "labels": labels if labels_needed else None,
        "targets": targets,
    }


def _missing(frame: Frame, key: str) -> str:
    if key == "q":
        return (
            "v_weights_from is missing: weighted='own' takes V's own features too, whose "
            "similarities are the weights of V->U."
        )
    return (
        f"weights_from is missing: name={frame.config.name!r} needs the locked tower's features, "
        "whose similarities are the weights (or masks)."
    )


def _check_targets_are_used(frame: Frame) -> None:
    """Raises if the caller's targets, or the gradient through them, would silently be ignored."""
    if frame.weights.name == "identity" or frame.kind == "none" or frame.weighted == "own":
        raise ValueError(
            f"name={frame.config.name!r}, weighted={frame.weighted!r} uses no weights that "
            "targets could replace; leave targets out."
        )
    if not frame.detach_weights and frame.config.form != "dense":
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
