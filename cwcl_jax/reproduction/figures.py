"""Pictures from several runs: Figure 5 over seeds, Figure 6 from the locked tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from cwcl_jax.evaluation.plots import draw_item, save_figure
from cwcl_jax.losses.weights import affine, exponential, rectified_square
from cwcl_jax.reproduction.measures import Spread

_STYLE = {"CL": ("#0072B2", "o"), "CWCL": ("#D55E00", "s")}
# Figure 6: the functions whose weights are printed under each picture.
WEIGHTS = {
    "paper": lambda cosine: affine(cosine, 0.0),
    "exp 0.1": lambda cosine: exponential(cosine, 10.0),
    "relu²": lambda cosine: rectified_square(cosine, 0.0),
}


def plot_templates(
    curves: Mapping[str, Mapping[str, Mapping[int, Spread]]],
    chance: Mapping[str, float],
    path: Path,
) -> Path:
    """Plots Figure 5, one panel per task: top-1 over the number of templates; returns the path.

    Error bars are intervals over seeds.

    Args:
      curves: task -> method -> number of templates -> accuracy in per cent.
      chance: task -> per cent.
    """
    figure = Figure(figsize=(3.6 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (task, methods) in zip(panels, curves.items(), strict=True):
        for shift, (method, curve) in zip((-0.04, 0.04), methods.items(), strict=False):
            colour, marker = _STYLE.get(method, ("#009E73", "D"))
            places = np.arange(len(curve)) + shift
            panel.errorbar(
                places, [s.mean for s in curve.values()], [s.half for s in curve.values()],
                label=method, color=colour, marker=marker, capsize=3,
            )  # fmt: skip
            panel.set_xticks(range(len(curve)), [str(k) for k in curve])
        panel.axhline(chance[task], color="grey", linestyle=":", linewidth=1, label="chance")
        panel.set_ylim(0, 102)
        panel.set_title(task, fontsize=11)
        panel.set_xlabel("number of templates k")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("zero-shot top-1, %")
    panels[-1].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_similarity(
    anchors: Sequence[int],
    previews: Sequence[Any],
    embeds: Float[np.ndarray, "n d"],
    path: Path,
    *,
    captions: Sequence[str],
    shown: int = 9,
) -> Path:
    """Plots Figure 6: anchors with other scenes by decreasing similarity; returns the path.

    The weights of each scene are printed below it.

    Args:
      anchors: rows of `embeds`.
      previews: previews of all scenes, from `Modality.preview`.
      embeds: features of the locked tower, rows of unit norm.
      captions: captions of all scenes.
    """
    figure = Figure(figsize=(1.55 * (shown + 1), 2.75 * len(anchors)), layout="constrained")
    grid = figure.subplots(len(anchors), shown + 1, squeeze=False)
    cosines = embeds @ embeds.T
    for row, anchor in zip(grid, anchors, strict=True):
        for place, other in enumerate([anchor, *_spread_out(cosines[anchor], anchor, shown)]):
            panel = row[place]
            draw_item(panel, previews[other])
            cosine = float(cosines[anchor, other])
            lines = [f"cos {cosine:.2f}"] + [
                f"{name} {float(function(np.float32(cosine))):.2f}"
                for name, function in WEIGHTS.items()
            ]
            panel.set_title("anchor" if place == 0 else f"#{place}", fontsize=8)
            panel.set_xlabel("\n".join(lines), fontsize=8)
            for spine in panel.spines.values():
                spine.set_linewidth(2.5 if place == 0 else 0.5)
        row[0].set_ylabel(_wrapped(captions[anchor]), fontsize=7)
    figure.suptitle(
        "An anchor and other scenes of a batch, from most to least similar in the locked tower: "
        "what CWCL's weights see, and CL calls negative alike",
        fontsize=10,
    )
    return save_figure(figure, path)


def _spread_out(cosines: Float[np.ndarray, " n"], anchor: int, count: int) -> list[int]:
    """Returns others sorted by similarity: the nearest three, then evenly down to the farthest."""
    order = [int(i) for i in np.argsort(-cosines, kind="stable") if i != anchor]
    rest = np.linspace(3, len(order) - 1, count - 3).round().astype(int)
    return [*order[:3], *(order[i] for i in rest)]


def _wrapped(text: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
