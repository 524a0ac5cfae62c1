"""Synthetic features of two modalities, u and v: `made:train?n=20000`, `made:test?n=1000`.

There are twelve groups of five classes each. A latent vector is the sum of its group's, its class's
and its own part; u and v are two fixed random networks of it, v with more noise. The cosines of u
thus reflect how similar two examples are: in class, in group, or not at all. For trying out
settings, for tests, and as a substitute for your own features (`arrays:`).
"""

import numpy as np
from jaxtyping import Float

from cwcl_jax.data.sources.arrays import Arrays
from cwcl_jax.data.sources.base import fingerprint_of

WIDTHS = {"u": 64, "v": 96}
_GROUPS, _CLASSES, _LATENT = 12, 60, 24
_NOISE = {"u": 0.05, "v": 0.6}
_SPLITS = {"train": 0, "test": 1}
# Part of the fingerprint: increase it when the numbers change.
_VERSION = 1


class Made(Arrays):
    """Features of one split, with their classes."""

    def __init__(self, split: str, length: int, seed: int):
        self._made = (split, length, seed)
        shared = np.random.default_rng([seed, 2])
        centres = shared.normal(size=(_GROUPS, _LATENT))[np.arange(_CLASSES) % _GROUPS]
        centres = centres + 0.7 * shared.normal(size=(_CLASSES, _LATENT))
        # One random stream per quantity, so that the first rows do not depend on the length.
        labels, own, *noises = (
            np.random.default_rng([seed, _SPLITS[split], what]) for what in range(2 + len(WIDTHS))
        )
        classes = labels.integers(_CLASSES, size=length)
        latent = centres[classes] + 0.5 * own.normal(size=(length, _LATENT))
        views = {
            name: _view(latent, width, shared) + _NOISE[name] * noise.normal(size=(length, width))
            for (name, width), noise in zip(WIDTHS.items(), noises, strict=True)
        }
        ids = np.asarray([f"{split}-{seed}-{number:08d}" for number in range(length)])
        rows = {name: view.astype(np.float32) for name, view in views.items()}
        super().__init__({"id": ids, "label": classes, **rows}, name="made")

    @property
    def class_names(self) -> list[str]:
        """Class and group of every label."""
        return [f"class {c} of group {c % _GROUPS}" for c in range(_CLASSES)]

    def fingerprint(self) -> str:
        return fingerprint_of("made", _VERSION, *self._made)


def _view(
    latent: Float[np.ndarray, "n z"], width: int, rng: np.random.Generator
) -> Float[np.ndarray, "n w"]:
    """Returns the output of a random network with one hidden layer."""
    first = rng.normal(size=(latent.shape[1], 2 * width)) / np.sqrt(latent.shape[1])
    second = rng.normal(size=(2 * width, width)) / np.sqrt(2 * width)
    return np.tanh(latent @ first) @ second


def open_made(split: str, *, n: int = 0, seed: int = 0) -> Made:
    """Opens `made:train` or `made:test`."""
    if split not in _SPLITS:
        raise ValueError(f"made: has the splits train and test, not {split!r}.")
    if n < 0:
        raise ValueError(f"made:{split}: n={n} is out of range.")
    return Made(split, n or {"train": 20_000, "test": 1_000}[split], seed)
