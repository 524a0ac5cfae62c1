"""Results as tables, for the terminal and for Markdown, with chance next to every accuracy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cwcl_jax.evaluation.results import TaskResult

_INTERVALS = (
    "Intervals: bootstrap over the test items of this one run; results.json has all of them."
)
_GROUPS = "Where several items share a text, all items of one text are drawn together."


@dataclass(frozen=True)
class Table:
    """A titled table of formatted cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Returns aligned columns for a terminal."""
        cells = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [_padded(row, widths) for row in cells]
        rule = "-" * len(lines[0])
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], rule, *self.notes])

    def markdown(self) -> str:
        """Returns a Markdown table under a heading."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", *self.notes])


def warning_lines(results: Iterable[TaskResult]) -> list[str]:
    """Returns the warnings of the tasks, one line each."""
    return [f"{result.name}: {warning}" for result in results for warning in result.warnings]


def interval_notes(results: Sequence[TaskResult]) -> list[str]:
    """Returns notes that explain the intervals of the results; empty without intervals."""
    notes = [_INTERVALS] if any(result.intervals for result in results) else []
    return [*notes, _GROUPS] if notes and any(map(drawn_groups, results)) else notes


def drawn_groups(result: TaskResult) -> int:
    """Returns how many groups of items the intervals resample; 0 if they resample single items."""
    groups = result.items.get("groups")
    count = 0 if groups is None or not result.intervals else len(np.unique(groups))
    return count if groups is not None and count < len(groups) else 0


def metric_header(name: str, *, first: bool) -> list[str]:
    return [name, "interval", "chance"] if first else [name, "chance"]


def metric_cells(result: TaskResult, key: str, *, first: bool) -> list[str]:
    """Returns the cells of one metric: value, interval (first metric only) and chance."""
    if key not in result.metrics:
        return ["", "", ""] if first else ["", ""]
    value, chance = percent(result.metrics[key]), percent(result.chance[key])
    low_high = result.intervals.get(key)
    interval = f"{100 * low_high[0]:.1f}-{100 * low_high[1]:.1f}" if low_high else ""
    return [value, interval, chance] if first else [value, chance]


def percent_of(result: TaskResult, key: str) -> str:
    return percent(result.metrics[key]) if key in result.metrics else ""


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest])
