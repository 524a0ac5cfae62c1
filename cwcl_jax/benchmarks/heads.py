"""Compares losses on heads alone: stored features of a trained encoder, a new head for each run.

    python -m cwcl_jax.benchmarks.heads --config=configs/speech_cwcl.py:head,init=runs/first \
        --losses=contrastive,affine,uniform0.53,relu2 --seeds=3 --output=heads.json

The features of the training data and of the test items are computed once and stored; after that a
head takes seconds. All losses see the same batches. `--projections=trained,mlp,none` compares a
linear projection, an MLP and nothing on the side that gives the weights; `--batches` compares batch
sizes with equally many examples and a proportional learning rate; `--steps` compares training
lengths, with the warm-up as a fixed share of the steps. `--group=4` fills batches with groups of
near duplicates: each example is joined by three random ones of its ten nearest in text space (in
groups above eleven, by all of its nearest). `--figure` draws metrics over the training length.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax import cli
from cwcl_jax.benchmarks.head_figure import plot_lengths
from cwcl_jax.benchmarks.head_runs import Head, HeadRuns, check_batch
from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash, with_tasks
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.files import replacing
from cwcl_jax.reproduction.measures import Spread, difference


def _define(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--losses", type=cli.words, default="contrastive,affine", help="short names")
    add(
        "--seeds",
        type=cli.at_least(1),
        default=3,
        help="number of seeds (0, 1, ...) of heads and order",
    )
    add("--projections", type=cli.words, default=[], help="trained,mlp,none; default: the config's")
    add(
        "--batches",
        type=cli.counts,
        default=[],
        help="batch sizes; the learning rate scales with them",
    )
    add(
        "--steps",
        type=cli.counts,
        default=[],
        help="steps per head; default: as many examples as in the config",
    )
    add("--group", type=cli.at_least(1), default=1, help="near duplicates per group in a batch")
    add("--tasks", default="", help="names, or a JSON file; default: all tasks of the config")
    add("--baseline", default="contrastive", help="loss that the gains are measured against")
    about = "file of all results; an existing one is continued"
    add("--output", type=cli.file, default="heads.json", help=about)
    add("--figure", type=cli.file, help="picture (.png) of the metrics over the training length")
    about = "metrics of the figure; default: the first of the table"
    add("--plotted", type=cli.words, default=[], help=about)


def compare(
    records: list[dict[str, Any]], metrics: list[str], baseline: str = "contrastive"
) -> Table:
    """Returns a table of means over seeds by loss, with differences to the baseline.

    Each difference is between heads that are equal in all but the loss.
    """
    heads = [Head(**record["head"]) for record in records]
    losses = list(dict.fromkeys(head.loss for head in heads))
    rest = list(dict.fromkeys(dataclasses.replace(head, loss="") for head in heads))
    values: dict[Head, dict[int, Mapping[str, float]]] = {}
    for record, head in zip(records, heads, strict=True):
        values.setdefault(head, {})[record["seed"]] = record["metrics"]
    rows = []
    for metric, other in itertools.product(metrics, rest):
        by_loss = [values.get(dataclasses.replace(other, loss=loss), {}) for loss in losses]
        base = values.get(dataclasses.replace(other, loss=baseline), {})
        cells = [_cell(own, {} if own is base else base, metric) for own in by_loss]
        rows.append((metric, *_words(other), _counts(by_loss), *cells))
    header = ("", "projection", "batch", "steps", "seeds", *losses)
    note = f"In brackets: minus {baseline} with the same seeds, and half its 95 % interval (t)."
    return Table("heads on one trunk", header, tuple(rows), (note,))


def _words(head: Head) -> tuple[str, str, str]:
    groups = f" in groups of {head.group}" * (head.group > 1)
    return head.projection, f"{head.batch}{groups}", str(head.steps)


def _counts(by_loss: Sequence[Mapping[int, Any]]) -> str:
    """Returns the number of seeds of every loss, or one number if all are equal."""
    counts = [str(len(seeds)) for seeds in by_loss]
    return counts[0] if len(set(counts)) == 1 else "/".join(counts)


def _cell(
    own: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]], metric: str
) -> str:
    """Returns a metric's mean over seeds, and its gain over the baseline's seeds."""
    if not own:
        return ""
    cell = f"{100 * np.mean([values[metric] for values in own.values()]):.1f}"
    common = sorted(set(own) & set(base))
    if len(common) < 2:
        return cell
    gain = difference(*(Spread(tuple(100 * r[s][metric] for s in common)) for r in (base, own)))
    told = f"± {gain.half:.1f}" if gain.interval else "in every seed"
    return f"{cell} ({gain.mean:+.1f} {told})"


_SHOWN = (
    *("top1", "top5", "top1_general", "_R@1", "_R@10"),
    "structure_between_modalities",
    "structure_kept_by_projection",
    "neighbours_kept_by_projection",
)


def headline(records: list[dict[str, Any]]) -> list[str]:
    """Returns the metrics that the table shows; of the texts' own accuracies only top-1."""
    return [
        name
        for name in records[0]["metrics"]
        if not name.startswith("train/")
        and name.endswith(_SHOWN)
        and not ("/text_top" in name and "top5" in name)
    ]


def read_records(output: Path, settings: str) -> list[dict[str, Any]]:
    """Returns the heads that an earlier command left, and creates the folder of `output`.

    Raises:
      ConfigError: the file cannot be continued. Heads of different configs must not share a table.
    """
    try:
        # Created now, so that a trained head can always be saved.
        output.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output={output} cannot be continued: {error}") from error
    if any(record.get("settings") != settings for record in records):
        raise ConfigError(f"{output} holds heads of another config: name another --output")
    return records


def wanted_heads(
    config: ExperimentConfig,
    losses: Sequence[str],
    *,
    projections: Sequence[str] = (),
    batches: Sequence[int] = (),
    steps: Sequence[int] = (),
    group: int = 1,
) -> list[Head]:
    """Returns every combination of the given values; empty ones keep the config's value.

    By default the steps keep the config's number of examples, not of steps.
    """
    bare = config.towers[config.loss.weights_from].head == "none"
    examples = config.total_steps * config.global_batch_size
    return [
        Head(loss, projection, batch, group, length)
        for projection in projections or ["none" if bare else "trained"]
        for batch in batches or [config.global_batch_size]
        for length in steps or [max(1, round(examples / max(batch, 1)))]
        for loss in losses
    ]


@cli.command(_define, config=True)
def main(options: argparse.Namespace) -> None:
    """Runs what is missing in the output file, and prints the table."""
    config = with_tasks(cli.required(options.config), options.tasks)
    heads = wanted_heads(
        config,
        options.losses,
        projections=options.projections,
        batches=options.batches,
        steps=options.steps,
        group=options.group,
    )
    for head in heads:
        head.variant(config, 0)  # invalid settings fail before anything is trained
    settings = config_hash(config)
    records = read_records(options.output, settings)
    done = {(Head(**record["head"]), record["seed"]) for record in records}
    runs: HeadRuns | None = None
    for seed, head in itertools.product(range(options.seeds), heads):
        if (head, seed) in done:
            continue
        runs = runs or _runs(config, heads)
        start = time.perf_counter()
        record = {"head": dataclasses.asdict(head), "seed": seed, "settings": settings}
        records.append(record | {"metrics": runs.run(head, seed)})
        with replacing(options.output) as partial:
            lines = ",\n".join(json.dumps(record) for record in records)
            partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{head} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(compare(records, headline(records), options.baseline).text())
    if options.figure:
        try:
            plot_lengths(records, options.plotted or headline(records)[:1], options.figure)
        except ValueError as error:
            raise ConfigError(f"--figure={options.figure}: {error}") from error


def _runs(config: ExperimentConfig, heads: Sequence[Head]) -> HeadRuns:
    runs = HeadRuns(config)
    for batch, group in {(head.batch, head.group) for head in heads}:
        check_batch(len(runs.features.u), batch, group)
    return runs


if __name__ == "__main__":
    sys.exit(main())
