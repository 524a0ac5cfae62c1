"""Views of a file of weights: other names and layouts, with nothing read in advance."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cwcl_jax.weights.readers import Entry, Weights

# Converts an array of a file to an array of the view.
Layout = Callable[[np.ndarray], np.ndarray]


class RenamedWeights:
    """A file under other names, each with a layout change; shapes follow from the layouts."""

    def __init__(self, weights: Weights, names: Mapping[str, tuple[str, Layout]]) -> None:
        self.source = weights.source
        self._weights = weights
        self._names = names
        self._cached: tuple[str, np.ndarray] | None = None
        self.entries = {
            name: _entry_after(weights.entries[original], layout)
            for name, (original, layout) in names.items()
        }

    def read(self, name: str) -> np.ndarray:
        original, layout = self._names[name]
        # Layers that are stacked in the file are read in sequence, so the last array is cached.
        if self._cached is None or self._cached[0] != original:
            self._cached = None
            self._cached = (original, self._weights.read(original))
        result = layout(self._cached[1])
        if self._cached[1].nbytes == result.nbytes:
            self._cached = None
        return result


def _entry_after(entry: Entry, layout: Layout) -> Entry:
    stand_in = np.broadcast_to(np.zeros((), np.float32), entry.shape)
    return Entry(tuple(layout(stand_in).shape), entry.dtype)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def apart(
    weights: Weights, parts_of: Callable[[str], Sequence[str]], *, turned: bool = False
) -> Weights:
    """Returns a view that splits arrays with several parts side by side.

    Args:
      parts_of: returns the names of the equal parts along the last axis of an array, in order; none
          for an array that is left unchanged.
      turned: whether such arrays are (out, in), as in PyTorch, and become (in, out).
    """
    names: dict[str, tuple[str, Layout]] = {}
    for name in weights.entries:
        parts = parts_of(name)
        for place, part in enumerate(parts):
            names[part] = (name, _part(place, len(parts), turned))
        if not parts:
            names[name] = (name, _same)
    return RenamedWeights(weights, names)


def _part(place: int, count: int, turned: bool) -> Layout:
    def cut(x: np.ndarray) -> np.ndarray:
        x = x.T if turned else x
        size = x.shape[-1] // count
        return x[..., place * size : (place + 1) * size]

    return cut


def _layer(index: int) -> Layout:
    return lambda x: x[index]


def unstacked(weights: Weights, pattern: str, *, joint: str = "_") -> Weights:
    """Returns a view with one array per layer for arrays with a leading layer axis.

    `pattern` has two groups around the position of the layer's number, which follows `joint`:
    `(.*encoderblock)(/.*)` turns `Transformer/encoderblock/x` into `Transformer/encoderblock_0/x`.
    """
    names: dict[str, tuple[str, Layout]] = {}
    for name, entry in weights.entries.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            names[name] = (name, _same)
            continue
        for index in range(entry.shape[0]):
            names[f"{match[1]}{joint}{index}{match[2]}"] = (name, _layer(index))
    return RenamedWeights(weights, names)


def without_prefix(weights: Weights, pattern: str) -> Weights:
    """Returns a view whose names have lost a leading match of `pattern`."""
    names = {re.sub(f"^(?:{pattern})", "", name): (name, _same) for name in weights.entries}
    return RenamedWeights(weights, names)


_EMBEDDING = re.compile(r".*(embed|embedding|embeddings|shared)(_\w+)?")


def flax_names(weights: Weights) -> Weights:
    """Returns a view of PyTorch's names and layouts as Flax's; files of Flax stay unchanged.

    `.` becomes `/`. A weight with one axis is a norm's `scale`. One with two axes is a `kernel`
    (transposed), or an `embedding` (kept) below a module with such a name. One with three (out, in,
    width) or four (out, in, y, x) axes is a convolution's kernel. Older files call a norm's weights
    gamma and beta.
    """
    if not any("." in name for name in weights.entries):
        return weights
    names: dict[str, tuple[str, Layout]] = {}
    for name, entry in weights.entries.items():
        *parents, last = name.split(".")
        path = "/".join([*parents, last])
        layout: Layout = _same
        if last in ("weight", "gamma"):
            parent = parents[-1] if parents else ""
            leaf, layout = _weight(len(entry.shape), parent)
            path = "/".join([*parents, leaf])
        elif last == "beta":
            path = "/".join([*parents, "bias"])
        names[path] = (name, layout)
    return RenamedWeights(weights, names)


def _weight(axes: int, parent: str) -> tuple[str, Layout]:
    """Returns Flax's name and layout of a PyTorch `weight` with that many axes."""
    if axes == 1:
        return "scale", _same
    if axes == 2 and _EMBEDDING.fullmatch(parent):
        return "embedding", _same
    order = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}[axes] if axes in (2, 3, 4) else None
    return "kernel", _same if order is None else lambda x: x.transpose(order)
