"""Results as tables, for the terminal and for Markdown: chance beside every accuracy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cwcl_jax.evaluation.options import CLASSIFICATION_KINDS, PROBE_KINDS
from cwcl_jax.evaluation.results import TaskResult

_INTERVALS = (
    "Intervals: bootstrap over the test items of this one run; results.json has all of them."
)

# CWCL Table 9: keyword spotting on Speech Commands V2 by models that were trained on its labels.
SUPERVISED_KEYWORDS = {
    "Attention RNN": 0.939,
    "KWT-2": 0.9774,
    "Wav2Vec2": 0.966,
    "M2D": 0.954,
    "M2D, fine-tuned": 0.985,
}


@dataclass(frozen=True)
class Table:
    """A titled table of ready-made cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Aligned columns for a terminal."""
        cells = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [_padded(row, widths) for row in cells]
        rule = "-" * len(lines[0])
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], rule, *self.notes])

    def markdown(self) -> str:
        """A Markdown table under a heading."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", *self.notes])


def result_tables(results: Sequence[TaskResult]) -> list[Table]:
    """All tables that `results` have something for."""
    makers = (_classification, _retrieval, _alignment, _probes)
    tables = [table for maker in makers if (table := maker(results)) is not None]
    if any(result.kind == "keywords" for result in results):
        tables.append(supervised_keywords())
    return tables


def supervised_keywords() -> Table:
    """Table 9's supervised models, for comparison with zero-shot keyword spotting."""
    rows = tuple((name, _percent(value)) for name, value in SUPERVISED_KEYWORDS.items())
    return Table(
        "Supervised keyword spotting (CWCL Table 9, Speech Commands V2)",
        ("model", "top-1 %"),
        rows,
        ("Published figures of models trained on labelled keywords; not measured here.",),
    )


def warning_lines(results: Iterable[TaskResult]) -> list[str]:
    """What the tasks warned of, one line each."""
    return [f"{result.name}: {warning}" for result in results for warning in result.warnings]


def _classification(results: Sequence[TaskResult]) -> Table | None:
    chosen = [result for result in results if result.kind in CLASSIFICATION_KINDS]
    if not chosen:
        return None
    tops = sorted({key for result in chosen for key in result.metrics if _is_top(key)}, key=_k)
    header = ["task", "prompts (all classes)"]
    for top in tops:
        header += _header(f"top-{_k(top)} %", first=top == tops[0])
    rows = []
    for result in chosen:
        for prefix, suffix, name in _shown_sets(result):
            row = [result.name, name]
            for top in tops:
                row += _cells(result, f"{prefix}{top}{suffix}", first=top == tops[0])
            row.append(_value(result, f"{prefix}mean_per_class_recall{suffix}"))
            rows.append((*row, str(len(result.items["labels"]))))
    notes = _interval_notes(chosen)
    if any("_general" in result.extras["prompt_sets"] for result in chosen):
        notes.append("general: the templates of A.3.5, the columns marked # in the paper's tables.")
    header += ["per class %", "items"]
    return Table("Zero-shot classification", tuple(header), tuple(rows), tuple(notes))


def _shown_sets(result: TaskResult) -> Iterable[tuple[str, str, str]]:
    """(prefix, suffix, name) of the prompt sets; all templates are not shown again as k = all."""
    sets = result.extras["prompt_sets"]
    counted = [count for suffix, (_, count) in sets.items() if suffix]
    for suffix, (name, count) in sets.items():
        if suffix == "" and count in counted and result.kind == "zero_shot":
            continue
        yield "", suffix, f"{name} ({count})"
        if any(key.startswith("text_") for key in result.metrics):
            yield "text_", suffix, f"{name} ({count}), the text itself"


def _retrieval(results: Sequence[TaskResult]) -> Table | None:
    chosen = [result for result in results if result.kind == "retrieval"]
    if not chosen:
        return None
    ks = sorted({int(k.rpartition("@")[2]) for r in chosen for k in r.metrics if "_R@" in k})
    header = ["task", "direction"]
    for k in ks:
        header += _header(f"R@{k} %", first=k == ks[0])
    rows = []
    for result in chosen:
        for way in result.extras["directions"]:
            row = [result.name, way.replace("_", " ")]
            for k in ks:
                row += _cells(result, f"{way}_R@{k}", first=k == ks[0])
            median = result.metrics[f"{way}_median_rank"]
            rows.append((*row, f"{median:g}", str(len(result.items[f"{way}_rank"]))))
    header += ["median rank", "queries"]
    return Table("Retrieval", tuple(header), tuple(rows), tuple(_interval_notes(chosen)))


def _alignment(results: Sequence[TaskResult]) -> Table | None:
    chosen = [result for result in results if result.kind == "alignment"]
    if not chosen:
        return None
    keys = list(dict.fromkeys(key for result in chosen for key in result.metrics))
    rows = [
        (
            key.replace("_", " "),
            *(f"{r.metrics[key]:.4f}" if key in r.metrics else "" for r in chosen),
        )
        for key in keys
    ]
    header = ("alignment", *(result.name for result in chosen))
    notes = ("block diagonality = mean cosine within classes minus mean cosine between them.",)
    return Table("Alignment of the two modalities", header, tuple(rows), notes)


def _probes(results: Sequence[TaskResult]) -> Table | None:
    chosen = [result for result in results if result.kind in PROBE_KINDS]
    if not chosen:
        return None
    rows = [
        (result.name, result.kind.replace("_", " "), key, *_cells(result, key, first=True))
        for result in chosen
        for key in result.metrics
        if key in result.chance
    ]
    header = ("task", "kind", "metric", "value %", "interval", "chance")
    return Table("Linear classifiers on frozen features", header, tuple(rows))


def _interval_notes(results: Sequence[TaskResult]) -> list[str]:
    return [_INTERVALS] if any(result.intervals for result in results) else []


def _header(name: str, *, first: bool) -> list[str]:
    return [name, "interval", "chance"] if first else [name, "chance"]


def _cells(result: TaskResult, key: str, *, first: bool) -> list[str]:
    """Value, interval (of the first metric only) and chance of one metric."""
    if key not in result.metrics:
        return ["", "", ""] if first else ["", ""]
    value, chance = _percent(result.metrics[key]), _percent(result.chance[key])
    low_high = result.intervals.get(key)
    interval = f"{100 * low_high[0]:.1f}-{100 * low_high[1]:.1f}" if low_high else ""
    return [value, interval, chance] if first else [value, chance]


def _value(result: TaskResult, key: str) -> str:
    return _percent(result.metrics[key]) if key in result.metrics else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _is_top(key: str) -> bool:
    return key.startswith("top") and key[3:].isdigit()


def _k(key: str) -> int:
    return int(key.removeprefix("top"))


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest])
