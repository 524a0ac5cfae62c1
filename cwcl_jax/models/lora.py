"""LoRA: a locked kernel W and a trained low-rank addition, W + (alpha / R) A B.

Hu et al. 2021, arXiv 2106.09685. `A` is initialised like a kernel and `B` is zero, so that a tower
initially computes the same as before. Encoders do not know about LoRA. The package's own dense
layers compute x W + (alpha / R) (x A) B, so that no gradient of a whole W is computed. Other
kernels (convolutions, layers of users' encoders) are replaced by the sums in `ModelDef.merge`
before a module is built. An exported model contains the sums.

A kernel `.../query/kernel` of shape (in, out) gets the leaves `.../query/lora_a/kernel`, (in, R),
and `.../query/lora_b/kernel`, (R, out). All axes before the last count as inputs, except the
layers' axis of stacked blocks, which stays the first axis of both leaves.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cwcl_jax.extension import is_reference
from cwcl_jax.models.layers import Linear
from cwcl_jax.models.tower import TowerConfig

_TUNE = re.compile(r"(?:(.+)\+)?lora:(.*)")
_STACKED = re.compile(r"towers/[^/]+/encoder/blocks/[a-z].*")
_NUMBER = re.compile(r"(?<=/)\d+(?=/)")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two low-rank leaves of one kernel.

    Attributes:
      kernel: path of the kernel.
      shape: shape of the kernel.
      rank: R.
      scale: alpha / R.
      layers: number of stacked layers, the kernel's first axis; 0 for a kernel of one layer.
      beside: whether the kernel's layer computes the addition itself, in addition to its product.
    """

    kernel: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    layers: int = 0
    beside: bool = False

    @property
    def paths(self) -> tuple[str, str]:
        """Paths of A and B."""
        place = self.kernel.removesuffix("/kernel")
        return f"{place}/lora_a/kernel", f"{place}/lora_b/kernel"

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the kernel as a matrix."""
        return math.prod(self.shape[bool(self.layers) : -1]), self.shape[-1]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the leaves' shapes by path; float32."""
        inputs, outputs = self.sizes
        front = self.shape[: bool(self.layers)]
        sizes = ((*front, inputs, self.rank), (*front, self.rank, outputs))
        return {
            path: jax.ShapeDtypeStruct(size, jnp.float32)
            for path, size in zip(self.paths, sizes, strict=True)
        }

    def initial(self, key: jax.Array) -> dict[str, jax.Array]:
        """Returns initial leaves: A normal with variance 1 / inputs, B zero.

        The key is folded with the kernel's path.
        """
        (a, b), (shape, _) = self.paths, self.sizes
        shapes = self.shapes()
        own = jax.random.fold_in(key, zlib.crc32(self.kernel.encode()))
        values = jax.random.normal(own, shapes[a].shape) * shape**-0.5
        return {a: values, b: jnp.zeros(shapes[b].shape)}

    def applied(self, kernel: Any, a: Any, b: Any) -> Any:
        """Returns the kernel with the addition, in its dtype; for shapes, the kernel's shape.

        The product is float32, whatever dtype the tower computes in: it costs little, and the sum
        is the same number in training and in an export.
        """
        if isinstance(kernel, jax.ShapeDtypeStruct):
            return kernel
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        change = self.scale * product.reshape(self.shape)
        return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def effective(leaves: Mapping[str, Any], adapters: Collection[Adapter]) -> dict[str, Any]:
    """Returns the leaves of the plain model: kernels are sums, low-rank leaves are gone."""
    result = dict(leaves)
    for adapter in adapters:
        a, b = (result.pop(path) for path in adapter.paths)
        result[adapter.kernel] = adapter.applied(result[adapter.kernel], a, b)
    return result


def dense_kernels(module: nnx.Module) -> frozenset[str]:
    """Returns the paths of the kernels whose layers can compute an addition themselves."""
    return frozenset(f"{path}/kernel" for path in _dense_layers(module))


def attach(module: nnx.Module, adapters: Sequence[Adapter], leaves: Mapping[str, Any]) -> None:
    """Sets the additions of the layers that compute them themselves; ignores other adapters."""
    beside = [adapter for adapter in adapters if adapter.beside]
    layers = _dense_layers(module) if beside else {}
    for adapter in beside:
        a, b = (leaves[path] for path in adapter.paths)
        layers[adapter.kernel.removesuffix("/kernel")].adapt(a, b, adapter.scale)


def _dense_layers(module: nnx.Module) -> dict[str, Linear]:
    return {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, Linear)
    }


def split_tune(tune: str) -> tuple[str, str]:
    """Returns the part of `tune` for the tower's own leaves, and R; "" without LoRA."""
    match = _TUNE.fullmatch(tune)
    return (match[1] or "none", match[2]) if match else (tune, "")


def find_adapters(
    leaves: Mapping[str, Any],
    trained: Collection[str],
    towers: Mapping[str, TowerConfig],
    dense: Collection[str] = (),
) -> tuple[Adapter, ...]:
    """Returns the adapters that the towers' settings request.

    Args:
      leaves: shapes of the leaves that could train, by path.
      trained: paths of those that train; a kernel among them gets no addition.
      dense: see `dense_kernels`; a user's encoder gets sums in any case, because it may read the
        kernels of its layers itself.

    Raises:
      ValueError: the rank is not a number or too large, an expression matches no kernel or only
          trained ones, or a setting of LoRA is given without LoRA.
    """
    found = []
    for name, tower in towers.items():
        kernels = {
            path.removeprefix(f"towers/{name}/"): path
            for path, leaf in leaves.items()
            if path.startswith(f"towers/{name}/") and path.endswith("/kernel") and leaf.ndim > 1
        }
        try:
            matched = [kernels[below] for below in _matched(list(kernels), tower)]
            locked = [path for path in matched if path not in trained]
            if matched and not locked:
                raise ValueError(
                    f"tune={tower.tune!r}: every kernel that lora_kernels={tower.lora_kernels!r} "
                    "matches trains as a whole, and needs no addition"
                )
            own = is_reference(tower.encoder)
            for path in locked:
                adapter = _adapter(path, leaves[path].shape, tower)
                beside = path in dense and not own
                found.append(dataclasses.replace(adapter, beside=beside))
        except ValueError as error:
            raise ValueError(f"towers.{name}: {error}") from error
    return tuple(found)


def _matched(kernels: list[str], tower: TowerConfig) -> list[str]:
    """Returns the kernels, by path below the tower, that the settings request LoRA for."""
    if not split_tune(tower.tune)[1]:
        if _TUNE.fullmatch(tower.tune):
            raise ValueError(f"tune={tower.tune!r}: the R of lora:R is missing")
        default = TowerConfig(tower.encoder)
        for field in ("lora_kernels", "lora_alpha"):
            if getattr(tower, field) != getattr(default, field):
                raise ValueError(
                    f"{field}={getattr(tower, field)!r} has no effect with tune={tower.tune!r}: "
                    "set tune='lora:R', with the rank R"
                )
        return []
    matched = set()
    for pattern in (part.strip() for part in tower.lora_kernels.split(",")):
        try:
            hits = [name for name in kernels if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"lora_kernels: {pattern!r} is not a regular expression: {error}"
            ) from error
        if not hits:
            known = dict.fromkeys(_NUMBER.sub("N", name) for name in kernels)
            raise ValueError(
                f"lora_kernels: {pattern!r} matches no kernel; there are "
                f"{', '.join(known) or 'none'}"
            )
        matched.update(hits)
    return [name for name in kernels if name in matched]


def _adapter(path: str, shape: tuple[int, ...], tower: TowerConfig) -> Adapter:
    text = split_tune(tower.tune)[1]
    if tower.lora_alpha < 0:
        raise ValueError(f"lora_alpha={tower.lora_alpha} must be at least 0")
    rank = int(text) if text.isdecimal() else 0
    layers = shape[0] if _STACKED.fullmatch(path) and len(shape) > 2 else 0
    adapter = Adapter(path, tuple(shape), rank, (tower.lora_alpha or rank) / max(rank, 1), layers)
    if not 1 <= rank <= min(adapter.sizes):
        raise ValueError(
            f"tune={tower.tune!r}: the rank is a number from 1 to {min(adapter.sizes)}, the "
            f"smaller side of {path}"
        )
    return adapter
