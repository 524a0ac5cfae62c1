"""A picture of heads: metrics over training length, a line for each loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cwcl_jax.evaluation.plots import save_figure
from cwcl_jax.reproduction.measures import Spread

_COLOURS = ("#0072B2", "#D55E00", "#7F7F7F", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP<X"
_SIDE = {
    "trained": "linear projection on the locked side",
    "mlp": "MLP on the locked side",
    "none": "nothing on the locked side",
}


def curves(
    records: Sequence[dict[str, Any]], projection: str, metric: str
) -> dict[str, dict[int, Spread]]:
    """Returns loss -> steps -> values over seeds in per cent, steps in increasing order."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        head = record["head"]
        if head["projection"] == projection and metric in record["metrics"]:
            by_steps = found.setdefault(head["loss"], {})
            by_steps.setdefault(head["steps"], []).append(100 * record["metrics"][metric])
    return {
        loss: {steps: Spread(tuple(values)) for steps, values in sorted(by_steps.items())}
        for loss, by_steps in found.items()
    }


def plot_lengths(records: Sequence[dict[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """Writes a picture: a row of panels for each metric, a column for each projection.

    Bars are 95 % intervals over three seeds or more. Panels of a row share their scale.

    Raises:
      ValueError: the records hold several batch sizes or groups, or lack a metric.
    """
    sizes = {(record["head"]["batch"], record["head"]["group"]) for record in records}
    if len(sizes) > 1:
        raise ValueError(f"a figure shows one batch and one group, the file holds {sorted(sizes)}")
    known = {name for record in records for name in record["metrics"]}
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"no head has the metric {metric!r}; there are {sorted(known)}")
    sides = [s for s in _SIDE if any(record["head"]["projection"] == s for record in records)]
    losses = list(dict.fromkeys(record["head"]["loss"] for record in records))
    figure = Figure(figsize=(4.2 * len(sides), 3.1 * len(metrics)), layout="constrained")
    shown: dict[str, Any] = {}
    grid = figure.subplots(len(metrics), len(sides), squeeze=False, sharex=True, sharey="row")
    for (row, metric), (column, side) in itertools.product(enumerate(metrics), enumerate(sides)):
        panel = grid[row, column]
        for loss, lengths in curves(records, side, metric).items():
            place = losses.index(loss) % len(_COLOURS)
            shown[loss] = panel.errorbar(
                list(lengths),
                [spread.mean for spread in lengths.values()],
                [spread.half if len(spread.values) > 2 else 0 for spread in lengths.values()],
                color=_COLOURS[place], marker=_MARKERS[place], markersize=4, capsize=2,
            )  # fmt: skip
        panel.set_xscale("log")
        ticks = sorted({record["head"]["steps"] for record in records})
        panel.set_xticks(ticks, [f"{steps:,}" for steps in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        if row == 0:
            panel.set_title(_SIDE[side], fontsize=10)
        if row == len(metrics) - 1:
            panel.set_xlabel(f"steps of {records[0]['head']['batch']} pairs")
        if column == 0:
            panel.set_ylabel(f"{metric}, %", fontsize=9)
    figure.legend(
        shown.values(),
        shown,
        fontsize=9,
        ncols=len(shown),
        loc="outside lower center",
        frameon=False,
    )
    save_figure(figure, path)
