"""Robustness to distribution shift: effective robustness of Taori et al. (2020).

A shifted accuracy is compared with what models of the same in-distribution accuracy usually reach:
a line in logit space, fitted to baseline models that the user names. Without baseline models, only
the drop and the ratio are reported, because no line is assumed.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cwcl_jax.evaluation.files import read_text
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.tables import Table

_CLIP = 1e-4


@dataclass(frozen=True)
class Line:
    """The fit logit(shifted) = slope * logit(in distribution) + intercept."""

    slope: float
    intercept: float
    models: int

    def expected(self, inside: float) -> float:
        return float(1.0 / (1.0 + np.exp(-(self.slope * _logit(inside) + self.intercept))))


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Returns the least-squares line in logit space over the baselines' accuracies.

    Each point is (in distribution, shifted).
    """
    if len({inside for inside, _ in points}) < 2:
        raise ValueError(
            f"{len(points)} baseline model(s): a line needs two with different accuracies."
        )
    x, y = (np.array([_logit(value) for value in side]) for side in zip(*points, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    return Line(float(slope), float(intercept), len(points))


def read_baselines(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Returns baseline models by task from a CSV file.

    Its columns are task, in_distribution and shifted; accuracies are shares.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"robustness_baselines={str(path)!r} is not a file; give a CSV with the columns task, "
            "in_distribution and shifted, or leave it empty."
        )
    reader = csv.DictReader(read_text(path).splitlines())
    missing = {"task", "in_distribution", "shifted"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} lacks the column(s) {sorted(missing)}.")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in reader:
        pair = row["in_distribution"], row["shifted"]
        try:
            inside, shifted = float(pair[0] or ""), float(pair[1] or "")
        except ValueError as error:
            raise ValueError(f"{path}, line {reader.line_num}: {pair} are not numbers.") from error
        if not (0.0 <= inside <= 1.0 and 0.0 <= shifted <= 1.0):
            raise ValueError(f"{path}: accuracies are fractions in 0..1, not {(inside, shifted)}.")
        points.setdefault(row["task"], []).append((inside, shifted))
    return points


def robustness_points(results: Sequence[TaskResult]) -> dict[str, tuple[float, float]]:
    """Returns (in-distribution, shifted) top-1 of each task whose in-distribution task also ran."""
    top1 = {r.name: r.metrics["top1"] for r in results if "top1" in r.metrics}
    return {
        result.name: (top1[result.in_distribution], top1[result.name])
        for result in results
        if result.name in top1 and result.in_distribution in top1
    }


def robustness_table(
    results: Sequence[TaskResult],
    baselines: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Table | None:
    """Returns one row per shifted task, or None if no task names an in-distribution one."""
    points = robustness_points(results)
    by_name = {result.name: result for result in results}
    rows = []
    notes = [
        f"{result.name}: its in-distribution task {result.in_distribution!r} "
        + ("has no top-1." if result.in_distribution in by_name else "did not run.")
        for result in results
        if result.in_distribution and result.name not in points
    ]
    if not points and not notes:
        return None
    for name, (inside, shifted) in points.items():
        usual = (baselines or {}).get(name)
        line = fit_line(usual) if usual else None
        expected = f"{100 * line.expected(inside):.2f}" if line else ""
        gain = f"{100 * (shifted - line.expected(inside)):+.2f}" if line else ""
        base = by_name[name].in_distribution
        rows.append(
            (
                name,
                base,
                f"{100 * inside:.2f}",
                f"{100 * shifted:.2f}",
                f"{100 * (shifted - inside):+.2f}",
                f"{shifted / inside:.3f}" if inside else "",
                expected,
                gain,
            )
        )
        own, inner = (set(by_name[n].extras.get("class_names", ())) for n in (name, base))
        if own != inner:
            notes.append(
                f"{name} and {base} have different classes ({len(own)} against {len(inner)}): "
                "compare with a task that has class_subset set to the same classes."
            )
    if points and not baselines:
        notes.append(
            "Effective robustness needs baseline models: name a CSV in robustness_baselines."
        )
    header = ("task", "in distribution", "its top-1 %", "top-1 %", "change", "ratio")
    return Table(
        "Robustness to distribution shift",
        (*header, "expected top-1 %", "effective robustness"),
        tuple(rows),
        tuple(notes),
    )


def _logit(share: float) -> float:
    share = min(max(share, _CLIP), 1.0 - _CLIP)
    return float(np.log(share / (1.0 - share)))
