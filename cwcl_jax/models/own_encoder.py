"""A user's encoder: `encoder="my_module:MyEncoder"`.

A class of flax.nnx, or of flax.linen:

    class MyEncoder(nnx.Module):
        def __init__(self, width: int = 64, *, rngs: nnx.Rngs): ...
        def __call__(self, inputs):             # name -> (b, ...), as the modality declares
            return ...                          # features (b, f)

The config's `overrides` are its arguments. If it has arguments of these names, it also gets
`dtype`, the compute dtype, and `arrays`, name -> (shape, dtype) of one example's inputs. The run
handles BatchNorm's running statistics and Dropout; see `models.leaves`. A module of flax.nnx is
switched by its `train()` and `eval()`. If `__call__` takes `train` or `deterministic` (or another
name of `_MODES`), as is usual in flax.linen, it receives the mode as that argument.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen, nnx

from cwcl_jax.extension import import_named
from cwcl_jax.models.transformer import Execution

_GIVEN = ("rngs", "dtype", "arrays")
# Arguments of `__call__` that state the mode, and their values in training.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def settings_of(encoder: str, preset: str, overrides: Mapping[str, Any], pooling: str) -> Any:
    """Returns the overrides as attributes, after checking that the class accepts them.

    Raises:
      ValueError: the class cannot be imported, is not a module, or has no such argument.
    """
    kind = _class_of(encoder)
    for name, value in (("preset", preset), ("pooling", pooling)):
        if value:
            raise ValueError(f"encoder {encoder!r} is your own and has no {name}: leave it out")
    parameters = _arguments(kind).values()
    known = [p.name for p in parameters if p.name not in (*_GIVEN, "parent", "name")]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in overrides:
        if name not in known and not anything:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"encoder {encoder!r} takes no argument {name!r}; {hint}it takes: "
                f"{', '.join(known) or 'none'}"
            )
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return types.SimpleNamespace(**plain)


def _arguments(kind: Any) -> dict[str, inspect.Parameter]:
    """Returns the arguments of `__init__`: nnx hides a class's signature behind its metaclass."""
    arguments = dict(inspect.signature(kind.__init__).parameters)
    arguments.pop("self", None)
    return arguments


def _class_of(encoder: str) -> Any:
    kind = import_named(encoder, "encoder")
    if not (isinstance(kind, type) and issubclass(kind, (nnx.Module, linen.Module))):
        raise ValueError(f"encoder {encoder!r} is not a class of flax.nnx or flax.linen modules")
    return kind


class OwnEncoder(nnx.Module):
    """Holds the user's module, and checks its output."""

    def __init__(
        self,
        encoder: str,
        settings: Any,
        execution: Execution,
        arrays: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
    ) -> None:
        if execution.scan_layers or execution.remat not in ("auto", "none"):
            raise ValueError(
                f"encoder {encoder!r} is your own: scan_layers and remat are for the built-in ones"
            )
        kind = _class_of(encoder)
        parameters = _arguments(kind)
        possible = {"rngs": rngs, "dtype": execution.dtype, "arrays": dict(arrays)}
        given = {name: value for name, value in possible.items() if name in parameters}
        sample = {
            name: jnp.zeros((2, *shape), jnp.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
        }
        takes = inspect.signature(kind.__call__).parameters
        self.takes_key = "key" in takes
        self.modes = tuple(name for name in _MODES if name in takes)
        self.is_linen = issubclass(kind, linen.Module)
        try:
            if self.is_linen:
                module = nnx.bridge.ToNNX(kind(**vars(settings), **given), rngs=rngs)
                self.module = nnx.bridge.lazy_init(module, sample, **self._mode(training=False))
            else:
                self.module = kind(**vars(settings), **given)
        except (TypeError, flax.errors.FlaxError, ValueError) as error:
            raise ValueError(
                f"encoder {encoder!r} cannot be built: {error}{_hint(error)}"
            ) from error
        self.feature_width = _width(encoder, self, sample)

    def __call__(self, inputs: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """Returns features (b, f); `_width` has checked their shape."""
        # Without a key nothing is random, and BatchNorm uses its running averages.
        if key is None:
            self.module.eval()
        else:
            self.module.train()
        call: Callable[..., Any] = self.module
        named = self._mode(training=key is not None)
        if self.takes_key:
            named["key"] = key
        if self.is_linen and key is not None:
            named["mutable"] = ["batch_stats"]
        return call(inputs, **named)

    def _mode(self, *, training: bool) -> dict[str, Any]:
        """Returns the mode for `__call__`, by the arguments that it has."""
        return {name: _MODES[name] is training for name in self.modes}


def _hint(error: Exception) -> str:
    """Returns the remedy for a module that does not know whether it is training."""
    if "use_running_average" in str(error) or "deterministic" in str(error):
        return "; give __call__ an argument train or deterministic, and pass it on"
    return ""


def _width(encoder: str, module: OwnEncoder, sample: Mapping[str, Any]) -> int:
    """Returns the width of the features, from shapes alone."""
    graphdef, state = nnx.split(module)
    try:
        made = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, sample)
    except Exception as error:
        shapes = {name: f"{a.dtype}{list(a.shape)}" for name, a in sample.items()}
        raise ValueError(
            f"encoder {encoder!r} fails on inputs {shapes}: {type(error).__name__}: {error}"
            f"{_hint(error)}"
        ) from error
    if not isinstance(made, jax.ShapeDtypeStruct) or made.ndim != 2 or made.shape[0] != 2:
        found = getattr(made, "shape", type(made).__name__)
        raise ValueError(
            f"encoder {encoder!r} must return features of shape (b, f), one row for each example; "
            f"for b=2 it returns {found}"
        )
    if not jnp.issubdtype(made.dtype, jnp.floating):
        raise ValueError(
            f"encoder {encoder!r} must return floating-point features, not {made.dtype}"
        )
    return int(made.shape[1])
