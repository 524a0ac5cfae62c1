"""Features that an encoder computed before: one array per example, of any shape."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ArraySpec, Modality, each

# The square of the norm below which `normalise` of the training step no longer gives unit rows.
_LEAST_SQUARE = 1e-24


@dataclasses.dataclass(frozen=True)
class FeatureInputs(Modality):
    """How a stored vector becomes `features`: float32, with the shape that the source has.

    A tower reads the source's array of its own name, or of the name `field`. `shape` is needed only
    by a user's encoder; "precomputed" knows its width.
    """

    name: ClassVar[str] = "features"
    stream: ClassVar[int] = 4

    field: str = ""
    shape: tuple[int, ...] = ()

    def arrays(self) -> dict[str, ArraySpec]:
        return {"features": ArraySpec(self.shape, "float32")}

    def prepare(self, value: Any, draws: Draws | None = None) -> dict[str, np.ndarray]:
        del draws
        return {"features": feature_vector(value)}

    def batch(self, items: Sequence[Any], *, first: int = 0) -> dict[str, np.ndarray]:
        return {"features": np.stack(each(feature_vector, items, first))}

    def listed(self, items: Any) -> list[Any]:
        """Returns one vector or many as a list."""
        if isinstance(items, (list, tuple)) and not items:
            return []
        array = np.asarray(items)
        return [array] if array.ndim == max(1, len(self.shape)) else list(array)

    def fitted(self, overrides: Mapping[str, Any]) -> "FeatureInputs":
        """Returns the inputs with the shape of an encoder that knows the width of its features."""
        width = overrides.get("width")
        return self if self.shape or not width else dataclasses.replace(self, shape=(width,))

    def fingerprint(self, *, training: bool = True) -> dict[str, Any]:
        return {}  # the source's fingerprint covers everything


def feature_vector(value: Any, where: str = "") -> np.ndarray:
    """Returns features of one example as float32, of any shape.

    Args:
      where: names the example in errors.

    Raises:
      BadExample: they hold NaN or infinity, only zeros, or numbers so large or small that float32
          cannot hold their norm; such features have no cosine.
    """
    vector = np.asarray(value, np.float32)
    if not usable_rows(vector[None]):
        if not np.isfinite(vector).all():
            raise BadExample("features not finite", where)
        if not vector.any():
            raise BadExample("features all zero", where)
        largest = f"the largest number is {np.abs(vector).max():.3g}"
        raise BadExample("features too large or too small", f"{where}: {largest}".lstrip(": "))
    return vector


def usable_rows(rows: np.ndarray) -> bool:
    """Returns whether every row (first axis) of a float32 array has a norm, and not 0."""
    flat = rows.reshape(len(rows), -1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", flat, flat)
    return bool(((squares > _LEAST_SQUARE) & (squares < np.inf)).all())


def only_features(arrays: Mapping[str, Any]) -> bool:
    """Returns whether a batch holds features instead of raw inputs."""
    return set(arrays) == {"features"}
