"""Curves of a run as PNG."""

from __future__ import annotations

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


def plot_losses(metrics: Path, output: Path) -> None:
    """Four panels over steps from metrics.jsonl; does nothing if it holds no steps."""
    records = [record for record in read_json_lines(metrics) if "loss" in record]
    if not records:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for name in names:
            _curve(axis, records, name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:  # a loss of the user's may report nothing else
            axis.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def _curve(axis: Any, records: list[dict[str, Any]], name: str) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=name)
