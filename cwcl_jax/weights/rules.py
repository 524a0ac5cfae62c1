"""Rules that map the names in a file to the paths of a tower, with every name accounted for.

A rule is an anchored regex on a file's name, the path below the tower, and a named transform. A
plan is made from shapes alone: if it fails, it does so before any array is read, and lists
everything that does not fit.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cwcl_jax.weights.failures import WeightsMismatch
from cwcl_jax.weights.readers import Entry, Weights

Shape = tuple[int, ...]
# A transform may use its target shape, for example to resample a position grid.
Transform = Callable[[np.ndarray, Shape], np.ndarray]


def _resample_grid(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns position embeddings (1, tokens, width) resampled for another image size.

    Resampling is linear and corner-aligned, big_vision's choice for AugReg models. If the number of
    tokens exceeds a square by one, the first token is the class token.
    """
    if array.shape == shape or array.ndim != 3 or array.shape[-1] != shape[-1]:
        return array
    old_side, new_side = int(array.shape[1] ** 0.5), int(shape[1] ** 0.5)
    extra = array.shape[1] - old_side**2
    if extra > 1 or shape[1] - new_side**2 != extra:
        return array
    weights = np.zeros((new_side, old_side), np.float32)
    centres = np.linspace(0, old_side - 1, new_side)
    for row, centre in enumerate(centres):
        left = min(int(centre), max(old_side - 2, 0))
        weights[row, left] += 1 - (centre - left)
        if old_side > 1:
            weights[row, left + 1] += centre - left
    grid = array[0, extra:].astype(np.float32).reshape(old_side, old_side, -1)
    grid = np.einsum("ia,jb,abd->ijd", weights, weights, grid)
    return np.concatenate([array[:, :extra], grid.reshape(1, new_side**2, -1)], axis=1)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Returns Keys' cubic kernel. PyTorch's resizing has a = -0.75, or -0.5 with antialiasing."""
    t = np.abs(distance)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _cubic_weights(old: int, new: int, antialias: bool) -> np.ndarray:
    """Returns weights (new, old) of PyTorch's bicubic resizing, with pixels at their centres."""
    ratio = old / new
    centres = (np.arange(new) + 0.5) * ratio
    if antialias:
        wide = max(ratio, 1.0)
        places = np.arange(old)[None, :] + 0.5
        weights = _keys((places - centres[:, None]) / wide, -0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    first = np.floor(centres - 0.5).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        # Beyond an edge, the last pixel repeats.
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            _keys(first + tap - (centres - 0.5), -0.75),
        )
    return weights.astype(np.float32)


def _bicubic_grid(array: np.ndarray, shape: Shape, *, antialias: bool = False) -> np.ndarray:
    """Returns position embeddings (1, tokens, width) resampled as PyTorch interpolates them.

    If the number of tokens exceeds a square by one, the first token is the class token.
    """
    if array.shape == shape or array.ndim != 3 or array.shape[-1] != shape[-1]:
        return array
    old, new = int(array.shape[1] ** 0.5), int(shape[1] ** 0.5)
    extra = array.shape[1] - old**2
    if extra > 1 or shape[1] - new**2 != extra:
        return array
    weights = _cubic_weights(old, new, antialias)
    grid = array[0, extra:].astype(np.float32).reshape(old, old, -1)
    grid = np.einsum("ia,jb,abd->ijd", weights, weights, grid, optimize=True)
    return np.concatenate([array[:, :extra], grid.reshape(1, new**2, -1)], axis=1)


TRANSFORMS: dict[str, Transform] = {
    "same": lambda x, shape: x,
    "grid": _resample_grid,
    "bicubic_grid": _bicubic_grid,
    "bicubic_grid_antialias": lambda x, shape: _bicubic_grid(x, shape, antialias=True),
    "table_to_bicubic_grid": lambda x, shape: _bicubic_grid(x[None], shape),
    # All axes in one; the axes in reverse order.
    "flat": lambda x, shape: x.reshape(-1),
    "reversed": lambda x, shape: x.transpose(),
    # (tokens, d) -> (1, tokens, d); (d) -> (1, 1, d)
    "table_to_grid": lambda x, shape: _resample_grid(x[None], shape),
    "one_token": lambda x, shape: x[None, None],
    # (d, heads, k) -> (d, heads * k); (heads, k) -> (heads * k); (heads, k, d) -> (heads * k, d)
    "join_last": lambda x, shape: x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]),
    "join_first": lambda x, shape: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]),
    # A table that a view took for a kernel.
    "turned": lambda x, shape: x.T,
    # Drops rows of a table that a layout does not use, for example BART's offset of two positions.
    "drop_two_rows": lambda x, shape: x[2:],
    # The first rows of a longer table, for example for clips below 30 s.
    "top_rows": lambda x, shape: x[: shape[0]],
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps `source` (full match) to `target`, where \\1 is the first group."""

    source: str
    target: str
    transform: str = "same"
    optional: bool = False
    """Dropped silently if the tower has no such leaf, or if the leaf has another shape."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one kind of file."""

    name: str
    signature: str
    """A regex that one name of the file matches if, and only if, it is of this kind."""
    rules: Sequence[Rule]
    ignore: Sequence[str] = ()
    """Names that are known and not part of a tower, such as a classifier or a decoder."""
    view: Callable[[Weights], Weights] = lambda weights: weights
    """Converts a file's names and layouts to those that the rules are written for."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """How one leaf is filled: from which names of the file, and by which transform.

    Stacked layers need several names.
    """

    target: str
    names: tuple[str, ...]
    transform: str
    stacked: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked assignment of a file to the leaves of a tower."""

    assignments: tuple[Assignment, ...]
    initialised: tuple[str, ...]
    """Leaves that the file does not hold and that stay as initialised (a new head)."""
    ignored: tuple[str, ...]
    """Names in the file that were left out by rule."""


def make_plan(weights: Weights, layout: Layout, leaves: Mapping[str, Any]) -> Plan:
    """Returns a plan that matches every name and every leaf.

    `leaves` are abstract, by path below the tower. Those below `head/` may be absent in the file.

    Raises:
      WeightsMismatch: lists everything that does not fit.
    """
    found: dict[str, tuple[str, Rule]] = {}
    ignored, unexpected, wrong = [], [], []
    for name, entry in weights.entries.items():
        target, rule = _match(name, layout, leaves)
        if rule is None:
            known = any(re.fullmatch(pattern, name) for pattern in layout.ignore)
            (ignored if known else unexpected).append(name)
            continue
        leaf, layers = _leaf_of(target, leaves)
        if leaf is None:
            (ignored if rule.optional else unexpected).append(name)
            continue
        shape = leaf.shape[1:] if layers else leaf.shape
        problem = _problem(entry, rule, shape)
        if problem and rule.optional:
            ignored.append(name)
        elif problem:
            wrong.append(f"{name} ({problem})")
        else:
            found[target] = (name, rule)
    assignments, missing = _assign(leaves, found)
    initialised = tuple(path for path in missing if path.startswith("head/"))
    missing = [path for path in missing if path not in initialised]
    if missing or unexpected or wrong:
        raise WeightsMismatch(
            weights.source,
            f"does not fit the tower as a {layout.name} file",
            missing=missing,
            unexpected=unexpected,
            wrong=wrong,
            remedy=_remedy(wrong),
        )
    return Plan(tuple(assignments), initialised, tuple(ignored))


def _match(name: str, layout: Layout, leaves: Mapping[str, Any]) -> tuple[str, Rule | None]:
    """Returns the leaf for an array of this name in a file, and the rule that names it.

    Of the rules that match, the first whose leaf the tower has is used, or else the first.
    """
    found: tuple[str, Rule | None] = ("", None)
    for rule in layout.rules:
        match = re.fullmatch(rule.source, name)
        if match:
            target = match.expand(rule.target)
            if _leaf_of(target, leaves)[0] is not None:
                return target, rule
            found = found if found[1] else (target, rule)
    return found


_LAYER = re.compile(r"(encoder/blocks)/(\d+)/(.+)")


def _leaf_of(target: str, leaves: Mapping[str, Any]) -> tuple[Any, int]:
    """Returns the leaf of a target and its number of stacked layers (0: not stacked)."""
    if target in leaves:
        return leaves[target], 0
    layer = _LAYER.fullmatch(target)
    stacked = leaves.get(f"{layer[1]}/{layer[3]}") if layer else None
    if stacked is None or layer is None or int(layer[2]) >= stacked.shape[0]:
        return None, 0
    return stacked, stacked.shape[0]


def _problem(entry: Entry, rule: Rule, shape: Shape) -> str:
    """Returns what is wrong with an array for a leaf of this shape, or ""."""
    if entry.dtype.kind not in "fV":
        return f"type {entry.dtype}, expected floating point"
    # An array of this shape that takes no memory; the transform determines the resulting shape.
    stand_in = np.broadcast_to(np.zeros((), np.float32), entry.shape)
    try:
        given = TRANSFORMS[rule.transform](stand_in, shape).shape
    except (ValueError, IndexError):
        return f"shape {entry.shape} cannot be read as {rule.transform!r}"
    return "" if given == tuple(shape) else f"shape {given}, expected {tuple(shape)}"


def _assign(
    leaves: Mapping[str, Any], found: Mapping[str, tuple[str, Rule]]
) -> tuple[list[Assignment], list[str]]:
    """Returns the assignments of all leaves, and the leaves that nothing fills."""
    assignments: list[Assignment] = []
    missing: list[str] = []
    for path, leaf in leaves.items():
        targets, stacked = [path], False
        if path not in found and path.startswith("encoder/blocks/"):
            tail = path.removeprefix("encoder/blocks/")
            if not tail.split("/")[0].isdecimal():
                targets = [f"encoder/blocks/{i}/{tail}" for i in range(leaf.shape[0])]
                stacked = True
        absent = [target for target in targets if target not in found]
        missing += absent
        if not absent:
            names = tuple(found[target][0] for target in targets)
            assignments.append(Assignment(path, names, found[targets[0]][1].transform, stacked))
    return assignments, missing


def _remedy(wrong: Sequence[str]) -> str:
    if wrong:
        return "check the tower's preset and overrides against the file's sizes"
    return "check that the file and the tower's encoder, preset, depth and pooling belong together"


def fill(weights: Weights, assignment: Assignment, leaf: Any) -> np.ndarray:
    """Returns one leaf in its own dtype, transformed; stacked layers are read one by one."""
    transform = TRANSFORMS[assignment.transform]
    dtype = np.dtype(leaf.dtype)
    if not assignment.stacked:
        array = transform(weights.read(assignment.names[0]), leaf.shape)
        return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(leaf.shape)
    result = np.empty(leaf.shape, dtype)
    for i, name in enumerate(assignment.names):
        result[i] = transform(weights.read(name), leaf.shape[1:])
    return result
