"""Features that an encoder computed before: one array per example, of any shape."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ArraySpec, Modality, each


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
        return {"features": _vector(value)}

    def batch(self, items: Sequence[Any], *, first: int = 0) -> dict[str, np.ndarray]:
        return {"features": np.stack(each(_vector, items, first))}

    def listed(self, items: Any) -> list[Any]:
        """Returns one vector or many as a list."""
        array = np.asarray(items)
        return [array] if array.ndim == max(1, len(self.shape)) else list(array)

    def fitted(self, overrides: Mapping[str, Any]) -> "FeatureInputs":
        """Returns the inputs with the shape of an encoder that knows the width of its features."""
        width = overrides.get("width")
        return self if self.shape or not width else dataclasses.replace(self, shape=(width,))

    def fingerprint(self, *, training: bool = True) -> dict[str, Any]:
        return {}  # the source's fingerprint covers everything


def _vector(value: Any) -> np.ndarray:
    """Returns features as float32; zero vectors are refused, because they have no cosine."""
    vector = np.asarray(value, np.float32)
    if not np.isfinite(vector).all():
        raise BadExample("features not finite")
    if not vector.any():
        raise BadExample("features all zero")
    return vector


def only_features(arrays: Mapping[str, Any]) -> bool:
    """Returns whether a batch holds features instead of raw inputs."""
    return set(arrays) == {"features"}
