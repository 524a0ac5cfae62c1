"""The Markdown page: our numbers over seeds, the paper's, and what can be concluded."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cwcl_jax.evaluation.tables import Table
from cwcl_jax.reproduction.experiments import Experiment
from cwcl_jax.reproduction.measures import Spread, difference, verdict
from cwcl_jax.reproduction.paper import TABLES

_PACKAGES = ("cwcl_jax", "jax", "jaxlib", "flax", "optax", "numpy")
Numbers = Mapping[str, Sequence[Spread]]


def table_section(experiment: Experiment, numbers: Numbers, seeds: Sequence[int]) -> str:
    """Returns our table, the paper's, the differences from the baseline, and a conclusion."""
    parts = [f"## {experiment.title}", experiment.about]
    rows = tuple((name, *map(str, cells)) for name, cells in numbers.items())
    title = f"Ours, per cent ({_seeds(seeds)})"
    parts.append(Table(title, ("", *experiment.columns), rows).markdown().strip())
    if experiment.paper:
        paper = TABLES[experiment.paper]
        rows = tuple((name, *(f"{x:.2f}" for x in row)) for name, row in paper.rows.items())
        title = f"The paper's Table {experiment.paper}, per cent"
        parts.append(Table(title, ("", *paper.columns), rows).markdown().strip())
    compared = _comparisons(experiment, numbers)
    if compared is not None:
        parts.append(compared.markdown().strip())
        parts.append(conclusion(experiment, numbers))
    return "\n\n".join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"one seed, {seeds[0]}: no interval"
    return f"mean over seeds {', '.join(map(str, seeds))} ± half of Student's 95 % interval"


def _pairs(experiment: Experiment, numbers: Numbers) -> list[tuple[str, str, str, Spread]]:
    """Returns (method, baseline, column, difference) of every method that has a baseline.

    The baseline of "CWCL, batch 64" is "CL, batch 64"; that of all others is the first row.
    """
    first = next(iter(numbers))
    found = []
    for name, cells in numbers.items():
        base = name.replace("CWCL", "CL", 1) if "CWCL" in name else first
        if base not in numbers or base == name or name.startswith(("CL", "text")):
            continue
        pairs = zip(experiment.columns, numbers[base], cells, strict=True)
        found += [(name, base, column, difference(a, b)) for column, a, b in pairs]
    return found


def _comparisons(experiment: Experiment, numbers: Numbers) -> Table | None:
    rows = tuple(
        (
            f"{name} against {base}",
            column,
            f"{change.mean:+.2f}",
            _interval(change),
            verdict(change),
        )
        for name, base, column, change in _pairs(experiment, numbers)
    )
    if not rows:
        return None
    header = ("", "column", "difference", "95 % interval over seeds", "")
    return Table("Differences, seed by seed", header, rows)


def _interval(change: Spread) -> str:
    if change.interval is None:
        return ""
    return f"{change.interval[0]:+.2f} to {change.interval[1]:+.2f}"


def conclusion(experiment: Experiment, numbers: Numbers) -> str:
    """Returns a paragraph on what the differences show, even if CWCL does not win."""
    pairs = [p for p in _pairs(experiment, numbers) if p[0].startswith(("CWCL", "affine"))]
    if not pairs:
        return ""
    if len(pairs[0][3].values) == 1:
        return "**One seed says nothing about others: no conclusion.**"
    verdicts = [verdict(change) for *_, change in pairs]
    higher, lower = verdicts.count("higher"), verdicts.count("lower")
    said = (
        f"At this scale CWCL is higher than CL in {higher} of {len(verdicts)} numbers, lower in "
        f"{lower}, and in {len(verdicts) - higher - lower} the seeds show no difference."
    )
    if higher <= lower:
        said += " So the paper's gain is not reproduced here."
    notes = ["The intervals are not corrected for the number of comparisons."]
    full = [column for *_, column, change in pairs if not any(change.values)]
    if full:
        notes.append(f"Equal in every seed, as at 100 %: {', '.join(dict.fromkeys(full))}.")
    return f"**{said}** " + " ".join(notes)


def closing_section(commands: Sequence[Sequence[str]], made_by: str, seconds: float) -> str:
    """Returns how the page was made: commands, versions, time."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    lines = ["## How this page was made", "", "    " + made_by, ""]
    if commands:
        lines += ["which ran", "", *("    " + shlex.join(command) for command in commands), ""]
        lines.append(f"Training and evaluation of these runs: {seconds / 60:.1f} minutes.")
    lines.append(f"Python {platform.python_version()}, {versions}, {platform.platform()}.")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def picture(path: Path, folder: Path, text: str) -> str:
    """Returns the Markdown of a picture in the page's folder, with its caption."""
    return f"![{text}]({path.relative_to(folder)})\n\n{text}"
