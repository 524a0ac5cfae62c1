"""What composed batches cost: `python -m cwcl_jax.benchmarks.composers --examples=100000000`.

Seconds of the processor and memory of `groups:` over a column that is drawn at random, and with
--neighbours of `near:` over features drawn around centres, beside how near its cells are.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cwcl_jax import cli
from cwcl_jax.data.composers import Composition
from cwcl_jax.data.composers.groups import Groups
from cwcl_jax.data.composers.near import Near, whole_rows

T = TypeVar("T")
_BATCHES, _CELL, _LOOKED_AT = 20, 8, 1000
_PER_CENTRE, _SPREAD = 100, 0.7


def _told(what: str, function: Callable[[], T]) -> T:
    start = time.process_time()
    made = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{what}: {time.process_time() - start:.2f} s, peak {peak:.2f} GB", flush=True)
    return made


def _batches(made: Composition, size: int) -> None:
    _told("first batch of an epoch", lambda: made.batch(0, 0))
    count = min(_BATCHES, made.steps - 1)
    start = time.process_time()
    for step in range(1, 1 + count):
        made.batch(0, step)
    print(f"another of {size}: {(time.process_time() - start) / max(1, count) * 1e3:.1f} ms")


def measure_groups(examples: int, per_group: int, k: int, batch: int) -> None:
    """Prints what `groups:` costs over as many examples."""
    rng = np.random.default_rng(0)
    groups = max(1, examples // per_group)
    numbers = np.arange(examples, dtype=np.int32)
    if per_group > 1:
        numbers = rng.integers(0, groups, examples, np.int32)
    print(f"{examples} examples in {groups} groups, an int32 column of {numbers.nbytes / 1e9} GB")
    made = _told("made", lambda: Groups(numbers, k=k, batch_size=batch, seed=0))
    _batches(made, batch)


def measure_near(examples: int, width: int, batch: int) -> None:
    """Prints what `near:` costs over as many features, and mean cosines in its cells."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, examples // _PER_CENTRE), width))
    rows = centres[rng.integers(0, len(centres), examples)]
    rows += _SPREAD * rng.normal(size=rows.shape)
    usable = np.ones(examples, bool)
    whole = _told(f"{examples} x {width}: whole numbers", lambda: whole_rows(rows, usable))
    options = {"share": 0.5, "size": _CELL, "batch_size": batch, "seed": 0}
    made = _told("the line", lambda: Near(whole, usable, **options))
    _batches(made, batch)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    steps = range(min(made.steps, max(1, _LOOKED_AT * _CELL // batch)))
    cells = np.concatenate([made.batch(0, step)[: batch // 2] for step in steps])
    cells = cells[: len(cells) // _CELL * _CELL].reshape(-1, _CELL)
    some = rng.integers(0, examples, 200)
    nearest = np.argpartition(-(unit[some] @ unit.T), _CELL - 1, axis=1)[:, :_CELL]
    drawn = rng.integers(0, examples, (_LOOKED_AT, _CELL))
    for what, sets in (("cells", cells), ("nearest", nearest), ("drawn", drawn)):
        print(f"mean cosine in {what} of {_CELL}: {_mean_cosine(unit[sets]):.3f}")


def _mean_cosine(sets: np.ndarray) -> float:
    """Returns the mean cosine of the pairs inside each of s sets of unit vectors, (s, k, d)."""
    upper = np.triu_indices(sets.shape[1], 1)
    return float((sets @ sets.transpose(0, 2, 1))[:, *upper].mean())


def _define(parser: argparse.ArgumentParser) -> None:
    for name, default, about in (
        ("examples", 10_000_000, "of the data set"),
        ("per-group", 5, "mean number of examples of a group; 1 = each its own"),
        ("k", 1, "examples of a group in a batch"),
        ("batch", 4096, "examples of a batch"),
        ("neighbours", 0, "measure near: over features of this width in place of groups:"),
    ):
        parser.add_argument(f"--{name}", type=cli.at_least(0), default=default, help=about)


@cli.command(_define)
def main(options: argparse.Namespace) -> None:
    """Measures one composer."""
    if options.neighbours:
        measure_near(options.examples, options.neighbours, options.batch)
    else:
        measure_groups(options.examples, max(1, options.per_group), options.k, options.batch)


if __name__ == "__main__":
    sys.exit(main())
