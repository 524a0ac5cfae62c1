"""Curves of a run as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cwcl_jax.files import replacing
from cwcl_jax.training.metrics import read_json_lines

_PANELS = (
    ("Loss by direction", ("loss_u_to_v", "loss_v_to_u")),
    ("Excess over the target entropy", ("excess",)),
    ("Accuracy in the batch", ("accuracy_u_to_v", "accuracy_v_to_u")),
    ("Inverse temperature", ("inverse_temperature",)),
)


def plot_losses(
    metrics: Path, output: Path, *, name: str, towers: Sequence[str], batch_size: int
) -> None:
    """Plots four panels over steps from metrics.jsonl; does nothing if it holds no steps.

    Args:
      name: name of the run, the picture's title.
      towers: U and V by name, so that each direction names what is searched with what.
      batch_size: pairs in a batch: guessing is right once in this many.
    """
    records = [record for record in read_json_lines(metrics) if "loss" in record]
    if not records:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(name)
    axes = figure.subplots(2, 2)
    u, v = towers
    directions = {"_u_to_v": f"{u} to {v}", "_v_to_u": f"{v} to {u}"}
    for axis, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for metric in names:
            _curve(axis, records, metric, directions.get(metric[-7:], metric))
        if "accuracy_u_to_v" in names and axis.lines:
            axis.axhline(1 / batch_size, color="grey", linestyle=":", label="chance")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:  # a user's loss may report no other metrics
            axis.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _curve(axis: Any, records: list[dict[str, Any]], name: str, label: str) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label)
