"""A module as a static definition and a flat dict of its arrays, by `/`-joined path.

`jax.jit` carries plain dicts, checkpoints store them, and regexes select from them. Calling an
`nnx.jit` with 150 leaves costs 16 ms per dispatch, a dict of as many arrays 1.3 ms.

The contents of a module are distinguished by type. `nnx.Param` can be trained. `nnx.BatchStat`
(running means and variances) is carried through the step and changes without a gradient. Arrays in
`nnx.data` are constants. Random state (of `nnx.Dropout`) is not a leaf: `merge` creates it from a
key.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from cwcl_jax.models.lora import Adapter, attach, effective

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """The static part of a module; hashable, and equal for two equal builds.

    Attributes:
      graphdef: the structure.
      keys: keys of the leaves, in order.
      statistics: paths of the leaves that are running statistics.
      constants: paths of the leaves that never change.
      random: keys of the random state, and whether each is a key (else a count).
      adapters: low-rank additions to kernels. Their leaves are leaves of the model; the module gets
          them beside the kernels, or gets the sums.
    """

    graphdef: nnx.GraphDef[Any]
    keys: tuple[Key, ...]
    statistics: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    random: tuple[tuple[Key, bool], ...] = ()
    adapters: tuple[Adapter, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all leaves, layers in numerical order, those of adapters last."""
        added = (path for adapter in self.adapters for path in adapter.paths)
        return (*map(_path, self.keys), *added)

    @property
    def plain(self) -> "ModelDef":
        """The definition without adapters."""
        return dataclasses.replace(self, adapters=())

    def merge(self, leaves: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """Returns the module with these leaves, which may be traced or abstract.

        Args:
          leaves: every leaf by path.
          key: initialises the module's random state; without it, the state is always the same.

        Raises:
          ValueError: leaves are missing or unknown.
        """
        missing = [path for path in self.paths if path not in leaves]
        unexpected = sorted(set(leaves) - set(self.paths))
        if missing or unexpected:
            raise ValueError(
                f"leaves do not fit the model: missing {missing[:5]} ({len(missing)} in all), "
                f"unexpected {unexpected[:5]} ({len(unexpected)} in all)"
            )
        leaves = effective(leaves, [x for x in self.adapters if not x.beside])
        state: dict[Any, Any] = {key: leaves[_path(key)] for key in self.keys}
        if self.random:
            first = jax.random.key(0) if key is None else key
            state |= {
                place: jax.random.fold_in(first, number) if is_key else jnp.zeros((), jnp.uint32)
                for number, (place, is_key) in enumerate(self.random)
            }
        module = nnx.merge(self.graphdef, nnx.from_flat_state(state))
        attach(module, self.adapters, leaves)
        return module

    def statistics_of(self, module: nnx.Module) -> dict[str, Any]:
        """Returns the current running statistics of a merged module, by path."""
        if not self.statistics:
            return {}
        flat = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
        return {_path(key): variable.get_value() for key, variable in flat}


def split(module: nnx.Module) -> tuple[ModelDef, dict[str, Any]]:
    """Returns the static definition of a module and its leaves: arrays, or shapes.

    Raises:
      ValueError: the module holds a kind of variable that training does not support.
    """
    graphdef, state = nnx.split(module)
    _refuse_hidden_arrays(graphdef)
    keys, leaves, random = [], {}, []
    statistics, constants = set(), set()
    for key, variable in nnx.to_flat_state(state):
        path = _path(key)
        if isinstance(variable, nnx.RngState):
            random.append((tuple(key), isinstance(variable, nnx.RngKey)))
            continue
        if isinstance(variable, nnx.BatchStat):
            statistics.add(path)
        elif not isinstance(variable, nnx.Variable):
            constants.add(path)
        elif not isinstance(variable, nnx.Param):
            raise ValueError(
                f"leaf {path} is a {type(variable).__name__}: only nnx.Param, nnx.BatchStat, "
                "nnx's random state and nnx.data (constants) are supported"
            )
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if not isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"leaf {path} is a {type(value).__name__}, not an array")
        keys.append(tuple(key))
        leaves[path] = value
    definition = ModelDef(
        graphdef, tuple(keys), frozenset(statistics), frozenset(constants), tuple(random)
    )
    return definition, leaves


def _refuse_hidden_arrays(graphdef: Any) -> None:
    """Raises ValueError for an array that nnx took for a setting: one set during tracing."""
    for name, attribute in getattr(graphdef, "attributes", ()):
        if isinstance(getattr(attribute, "value", None), Tracer):
            raise ValueError(
                f"attribute {name!r} of a module is a plain array: write nnx.data(...) around it "
                "for a constant, or nnx.Param(...) to train it"
            )


def abstract_split(build: Callable[[], nnx.Module]) -> tuple[ModelDef, dict[str, Any]]:
    """Returns the definition of the module that `build` returns, and the shapes of its leaves.

    Nothing is allocated.
    """
    found: list[ModelDef] = []

    def leaves() -> dict[str, Any]:
        definition, arrays = split(build())
        found.append(definition)
        return arrays

    shapes = jax.eval_shape(leaves)
    return found[0], {path: shapes[path] for path in found[0].paths}


def _path(key: Key) -> str:
    return "/".join(map(str, key))
