"""Plots of an evaluation: template robustness (CWCL Figure 5) and alignment (Figures 7 and 8)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cwcl_jax.files import replacing

# Colours are distinguishable for colour-blind readers; markers also distinguish them in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


def draw_item(panel: Any, shown: Any) -> None:
    """Draws what `Modality.preview` returns for an item: a picture, a text, or lines over time."""
    panel.set_xticks([])
    panel.set_yticks([])
    if isinstance(shown, str):
        text = textwrap.fill(shown, 22)
        panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes, fontsize=8)
    elif shown.dtype == np.uint8 and shown.ndim == 3:
        panel.imshow(shown, interpolation="nearest")
    else:
        lines = np.asarray(shown, np.float32).reshape(-1, shown.shape[-1] if shown.ndim else 1)
        apart = float(np.ptp(lines)) or 1.0
        for place, line in enumerate(lines):
            panel.plot(line - place * apart, linewidth=0.7, color="black")


def plot_template_robustness(
    curves: Mapping[str, Mapping[int, float]],
    path: Path,
    *,
    chance: Mapping[str, float] | None = None,
    intervals: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
    title: str = "Accuracy by number of prompt templates",
) -> Path:
    """Plots top-1 accuracy (shares) over the number of templates, one curve per run or task.

    `chance` draws one dotted line per name in it, in the colour of that curve. `intervals` draws a
    band around the counts that it contains. Returns the path.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    counts = sorted({k for curve in curves.values() for k in curve})
    place = {k: at for at, k in enumerate(counts)}
    for at, (name, curve) in enumerate(curves.items()):
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        ks = sorted(curve)
        x, y = [place[k] for k in ks], [100 * curve[k] for k in ks]
        axes.plot(x, y, label=name, color=colour, marker=marker)
        bounds = (intervals or {}).get(name, {})
        if banded := [k for k in ks if k in bounds]:
            low, high = zip(*(bounds[k] for k in banded), strict=True)
            axes.fill_between(
                [place[k] for k in banded], 100 * np.asarray(low), 100 * np.asarray(high),
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        if chance and name in chance:
            axes.axhline(100 * chance[name], color=colour, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(counts)), [str(k) for k in counts])
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("number of templates k")
    axes.set_ylabel("zero-shot top-1 accuracy, %")
    axes.set_title(title + ("\n(dotted: chance)" if chance else ""), fontsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_matrices(
    matrices: Mapping[str, Float[np.ndarray, "n m"]],
    class_sizes: Sequence[int],
    class_names: Sequence[str],
    path: Path,
    *,
    x_label: str = "text embeddings",
    y_label: str = "speech embeddings",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Plots cosine similarities sorted by class, one panel per run; returns the path.

    All panels share one colour scale.
    """
    figure = Figure(figsize=(1.8 + 4.4 * len(matrices), 6.0), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    low = min(float(matrix.min()) for matrix in matrices.values())
    high = max(float(matrix.max()) for matrix in matrices.values())
    ends = np.cumsum(class_sizes)
    middles = ends - np.asarray(class_sizes) / 2 - 0.5
    image = None
    for panel, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image = panel.imshow(matrix, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        for end in ends[:-1]:
            panel.axhline(end - 0.5, color="white", linewidth=0.8)
            panel.axvline(end - 0.5, color="white", linewidth=0.8)
        panel.set_xticks(middles, class_names, rotation=35, ha="right", fontsize=8)
        panel.set_yticks(middles, class_names if panel is panels[0] else [], fontsize=8)
        note = f"\n{notes[name]}" if notes and name in notes else ""
        panel.set_title(name + note, fontsize=10)
        panel.set_xlabel(x_label)
    panels[0].set_ylabel(y_label)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="cosine similarity", shrink=0.8)
    return save_figure(figure, path)


def plot_effective_robustness(
    points: Mapping[str, tuple[float, float]],
    path: Path,
    *,
    x_label: str = "accuracy in distribution, %",
    title: str = "Robustness to distribution shift",
) -> Path:
    """Plots accuracy under shift against accuracy in distribution, with the line of no loss."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for at, (name, (inside, shifted)) in enumerate(points.items()):
        axes.scatter(
            100 * inside,
            100 * shifted,
            color=_COLOURS[at % len(_COLOURS)],
            marker=_MARKERS[at % len(_MARKERS)],
            label=name,
        )
    top = 100 * max(max(point) for point in points.values()) * 1.05 + 1
    axes.plot([0, top], [0, top], color="grey", linestyle="--", linewidth=1, label="no loss")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel(x_label)
    axes.set_ylabel("accuracy under shift, %")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix, and the folder; returns the path."""
    # Creates its own canvas, so that a program's own matplotlib backend is never touched.
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=130, bbox_inches="tight")
    return path
