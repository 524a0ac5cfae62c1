"""Evaluates a run or an imported model: `python -m cwcl_jax.evaluate --workdir=runs/NAME`.

The tasks are those of the run's settings, some of them (`--tasks=shape,retrieval`), or those of a
JSON file (`--tasks=tasks.json`: name -> fields of the task). `--config=FILE` instead of a workdir
evaluates the weights that the config imports, untrained. `--compare=DIR` adds paired tests against
another run that was evaluated on the same tasks. `--audio=a.wav --classes="play music,stop"` ranks
classes for one recording, `--image=a.png` for one picture.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig, with_tasks
from cwcl_jax.paths import to_path

if TYPE_CHECKING:
    from cwcl_jax.evaluation.compare import SavedItems
    from cwcl_jax.evaluation.results import TaskResult
    from cwcl_jax.training.encode import Encoder
    from cwcl_jax.training.feature_cache import FeatureCache
    from cwcl_jax.training.state import TowerSource
    from cwcl_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command line."""

    workdir: str = ""
    config: ExperimentConfig | None = None
    step: int | str | None = None
    weights: str = "trained"
    tasks: str = ""
    output: str = ""
    compare: str = ""
    audio: str = ""
    image: str = ""
    classes: str = ""
    templates: str = "name"


def _define(parser: ArgumentParser) -> None:
    about = {
        "workdir": "folder of the run to evaluate",
        "tasks": "names of tasks, separated by commas, or a JSON file of tasks; default: all",
        "output": "folder for the results; default: WORKDIR/evaluation, or runs/NAME-imported",
        "compare": "another run, evaluated before: paired tests against it",
        "audio": "one recording to classify (with --classes)",
        "image": "one picture to classify (with --classes)",
        "classes": "class names for --audio or --image, separated by commas, or a file of them",
        "templates": "prompts for --classes: name, simple, general or a file",
    }
    for name, text in about.items():
        parser.add_argument(f"--{name}", default=getattr(Options, name), help=text)
    about = "checkpoint to evaluate, or best; default: the latest"
    parser.add_argument("--step", type=cli.step, help=about)
    about = "the run's weights: as trained, or their moving averages"
    parser.add_argument("--weights", default="trained", choices=["trained", "ema"], help=about)


@cli.command(_define, config=True)
def main(options: Namespace) -> int:
    """Evaluates what the command line asks for."""
    fields = [field.name for field in dataclasses.fields(Options)]
    return evaluate(Options(**{name: getattr(options, name) for name in fields}))


def evaluate(options: Options) -> int:
    """Evaluates, alone or as a process of a job, and writes results; returns the exit code."""
    _check(options)
    # Imported here, so that flags and settings are checked before the slow imports.
    from cwcl_jax.training.distributed import initialize, run_main
    from cwcl_jax.training.options import DistributedConfig

    settings = options.config.distributed if options.config else DistributedConfig()
    initialize(settings)
    return run_main(lambda watchdog: _evaluate(options, watchdog), settings, code_of=cli.exit_code)


def _evaluate(options: Options, watchdog: Watchdog) -> int:
    from cwcl_jax.data.skipping import TooManyBadExamples
    from cwcl_jax.training.feature_cache import FeatureCache

    try:
        encoder, config, sources = _load(options)
        encoder.on_batch = watchdog.beat
        with watchdog.phase("evaluation"):
            if options.audio or options.image:
                _rank_one(options, encoder, config)
            else:
                kept = FeatureCache(encoder, sources)
                _run_tasks(options, kept, with_tasks(config, options.tasks), sources)
                kept.save()
    except (ValueError, FileNotFoundError, ImportError, TooManyBadExamples) as error:
        raise ConfigError(str(error)) from error
    return cli.DONE


def _check(options: Options) -> None:
    if bool(options.workdir) == (options.config is not None):
        raise ConfigError("give either --workdir=RUN or --config=FILE of an imported model")
    if options.audio and options.image:
        raise ConfigError("give --audio or --image, not both")
    if options.config is not None and (options.step is not None or options.weights != "trained"):
        raise ConfigError(
            "--step and --weights belong to --workdir: an imported model has one step"
        )
    if (options.audio or options.image) and not options.classes:
        raise ConfigError('--audio and --image need --classes="first,second,..."')
    if options.audio or options.image:
        _check_single(options)
    elif options.classes:
        raise ConfigError("--classes belongs to --audio or --image; tasks have class_names")
    elif options.templates != Options.templates:
        raise ConfigError("--templates belongs to --audio or --image; tasks have templates")
    if options.compare:
        # Imported here, so that errors in other flags are reported before the slow imports.
        from cwcl_jax.evaluation.compare import item_files

        try:
            item_files(to_path(options.compare))
        except FileNotFoundError as error:
            raise ConfigError(f"--compare={options.compare}: {error}") from error


def _check_single(options: Options) -> None:
    for name in ("tasks", "compare", "output"):
        if getattr(options, name):
            raise ConfigError(f"--{name} has no effect with --audio or --image, which run no task")
    path = options.audio or options.image
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")


def _typed_classes(classes: str) -> list[str]:
    """Returns the names in `--classes`, or in the file that it names; at least two are needed."""
    from cwcl_jax.evaluation.class_names import read_class_names

    if "," not in classes and not to_path(classes).expanduser().is_file():
        raise ConfigError(
            f"--classes={classes}: this is one class and not a file; give two or more, separated "
            "by commas, or a file with one a line"
        )
    given = read_class_names(classes)
    return given if isinstance(given, list) else [names[0] for names in given.values() if names]


def _load(options: Options) -> tuple[Encoder, ExperimentConfig, Mapping[str, TowerSource]]:
    # Imported here, so that flags and settings are checked before the slow imports.
    from cwcl_jax.training.encode import imported_encoder, load_encoder, tower_sources

    if options.config is None:
        workdir = to_path(options.workdir)
        loaded = load_encoder(workdir, options.step, weights=options.weights)
        return *loaded, tower_sources(workdir)
    encoder, sources = imported_encoder(options.config)
    for modality, source in sources.items():
        print(f"{modality} tower: {source.source}")
        if source.random or not source.sha256:
            parts = sorted({path.split("/")[2] for path in source.random}) or ["whole tower"]
            print(f"warning: {' and '.join(parts)} of the {modality} tower: random, untrained")
    return encoder, options.config, sources


def _run_tasks(
    options: Options,
    kept: FeatureCache,
    config: ExperimentConfig,
    sources: Mapping[str, TowerSource],
) -> None:
    from cwcl_jax.evaluation.checks import check_tasks
    from cwcl_jax.evaluation.compare import check_common, load_items
    from cwcl_jax.evaluation.runner import run_tasks
    from cwcl_jax.training.checks import check_task_inputs
    from cwcl_jax.training.distributed import is_primary

    others = {}
    if options.compare:
        # Loaded now: the other run may be this one at another step, with results in this folder.
        others = load_items(to_path(options.compare))
        check_common(config.evaluation.tasks, others)
    check_tasks(config.evaluation, towers=config.towers, cache_dir=config.data.cache_dir)
    encoder = kept.encoder
    tasks = config.evaluation.tasks
    check_task_inputs(encoder.blueprint, tasks, sources, encoder.step, encoder.weights)
    results = run_tasks(
        config.evaluation,
        encode=kept.encode,
        data=config.data,
        features=partial(kept.encode, output="features"),
        weights_from=config.loss.weights_from,
        seen=_seen(config) if options.workdir else {},
    )
    if is_primary():
        _write(options, config, results, others, kept.encoder.step)


def _seen(config: ExperimentConfig) -> dict[str, str]:
    """Returns notes on which of the tasks' data the run was trained on.

    Empty if the training data is not available.
    """
    from cwcl_jax.data.sources import open_source
    from cwcl_jax.evaluation.runner import seen_in_training

    try:
        train = open_source(config.data.train, cache_dir=config.data.cache_dir)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"the tasks' data was not compared with the training data: {error}")
        return {}
    return seen_in_training(config.evaluation, train, config.data)


def _write(
    options: Options,
    config: ExperimentConfig,
    results: list[TaskResult],
    others: Mapping[str, SavedItems],
    step: int,
) -> None:
    """Prints and writes the results, then compares them.

    The comparison comes last, so that a failure in it cannot lose the results.
    """
    from cwcl_jax.evaluation.compare import compare_with
    from cwcl_jax.evaluation.report import (
        page_title,
        tasks_beside,
        terminal_report,
        write_page,
        write_report,
    )

    baselines = config.evaluation.robustness_baselines
    name = to_path(options.workdir).resolve().name if options.workdir else f"{config.name}-imported"
    folder = to_path(options.output or to_path(options.workdir or f"runs/{name}") / "evaluation")
    averages = " (ema)" if options.weights == "ema" else ""
    weights = f"step {step}{averages}" if options.workdir else "imported"
    if removed := tasks_beside(folder, results):
        print(
            f"the earlier results in {folder} are replaced, also those of {', '.join(removed)}; "
            "--output=DIR keeps both"
        )
    files = write_report(results, folder, model=name, pretrained=weights, baselines_file=baselines)
    print(terminal_report(results, baselines_file=baselines))
    if others:
        other = to_path(options.compare).resolve().name
        table, pictures = compare_with(results, name, others, other, folder)
        print("\n" + table.text())
        write_page(
            results,
            folder,
            title=page_title(name, weights),
            more_tables=[table],
            baselines_file=baselines,
        )
        files += pictures
    print(f"\nwritten to {folder}: {', '.join(str(path.relative_to(folder)) for path in files)}")


def _rank_one(options: Options, encoder: Encoder, config: ExperimentConfig) -> None:
    from cwcl_jax.evaluation.single import rank_classes

    modality, path = ("speech", options.audio) if options.audio else ("image", options.image)
    towers = [t for t in config.towers if config.data.inputs_of(t).name == modality]
    if not towers:
        raise ConfigError(f"{path}: the model has no {modality} tower, only {list(config.towers)}")
    ranked = rank_classes(
        Path(path),
        towers[0],
        _typed_classes(options.classes),
        encode=encoder.encode,
        data=config.data,
        templates=options.templates,
    )
    print(ranked.table(path).text())


if __name__ == "__main__":
    sys.exit(main())
