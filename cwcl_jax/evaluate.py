"""Evaluates a run or an imported model: `python -m cwcl_jax.evaluate --workdir=runs/NAME`.

The tasks are those of the run's settings, some of them (`--tasks=shape,retrieval`), or those of a
JSON file (`--tasks=tasks.json`: name -> fields of TaskConfig). `--config=FILE` in place of a
workdir evaluates the weights that the config imports, untrained. `--compare=DIR` adds paired
tests against another run that was evaluated on the same tasks. `--audio=a.wav
--classes="play music,stop"` ranks classes for one recording, `--image=a.png` for one picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig, from_config_dict, to_plain

if TYPE_CHECKING:
    from cwcl_jax.evaluation.results import TaskResult
    from cwcl_jax.training.encode import Encoder
    from cwcl_jax.training.kept_rows import KeptRows
    from cwcl_jax.training.state import TowerSource
    from cwcl_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    workdir: str = ""
    config: ExperimentConfig | None = None
    step: int | None = None
    tasks: str = ""
    output: str = ""
    compare: str = ""
    audio: str = ""
    image: str = ""
    classes: str = ""
    templates: str = "name"


def define_flags() -> Callable[[], Options]:
    """Defines the flags; the result reads them after they were parsed."""
    config = cli.define_config_flag()
    flags.declare_key_flag("config")  # so that --help shows it
    about = {
        "workdir": "Folder of the run to evaluate.",
        "tasks": "Names of tasks, separated by commas, or a JSON file of tasks; default: all.",
        "output": "Folder for the results; default: WORKDIR/evaluation, or runs/NAME-imported.",
        "compare": "Another run, evaluated before: paired tests against it.",
        "audio": "One recording to classify (with --classes).",
        "image": "One picture to classify (with --classes).",
        "classes": "Class names for --audio or --image, separated by commas.",
        "templates": "Prompts for --classes: name, simple, general or a file.",
    }
    holders = {
        name: flags.DEFINE_string(name, "name" if name == "templates" else "", text)
        for name, text in about.items()
    }
    step = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; default: the latest.")

    def read() -> Options:
        values = {name: str(holder.value) for name, holder in holders.items()}
        given = cli.resolve_config(config) if config.value is not None else None
        return Options(config=given, step=step.value, **values)

    return read


def evaluate(options: Options) -> int:
    """Runs what the options ask for, alone or as one process of a job; the results are written."""
    _check(options)
    # Here and not above: flags and settings are checked before the slow imports.
    from cwcl_jax.training.distributed import initialize, run_main
    from cwcl_jax.training.options import DistributedConfig

    settings = options.config.distributed if options.config else DistributedConfig()
    initialize(settings)
    return run_main(lambda watchdog: _evaluate(options, watchdog), settings, code_of=cli.exit_code)


def _evaluate(options: Options, watchdog: Watchdog) -> int:
    from cwcl_jax.training.kept_rows import KeptRows

    encoder, config, sources = _load(options)
    encoder.on_batch = watchdog.beat
    try:
        with watchdog.phase("evaluation"):
            if options.audio or options.image:
                _rank_one(options, encoder, config)
            else:
                kept = KeptRows(encoder, sources)
                _run_tasks(options, kept, _with_tasks(config, options.tasks))
                kept.save()
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return cli.DONE


def _check(options: Options) -> None:
    if bool(options.workdir) == (options.config is not None):
        raise ConfigError("give either --workdir=RUN or --config=FILE of an imported model")
    if options.audio and options.image:
        raise ConfigError("give --audio or --image, not both")
    if (options.audio or options.image) and not options.classes:
        raise ConfigError('--audio and --image need --classes="first,second,..."')
    if options.classes and not (options.audio or options.image):
        raise ConfigError("--classes belongs to --audio or --image; tasks have class_names")
    if options.compare:
        # Here and not above: a mistake among the other flags is told before the slow imports.
        from cwcl_jax.evaluation.compare import item_files

        try:
            item_files(Path(options.compare))
        except FileNotFoundError as error:
            raise ConfigError(f"--compare={options.compare}: {error}") from error


def _load(options: Options) -> tuple[Encoder, ExperimentConfig, Mapping[str, TowerSource]]:
    # Here and not above: flags and settings are checked before the slow imports.
    from cwcl_jax.training.encode import imported_encoder, load_encoder, tower_sources

    if options.config is None:
        workdir = Path(options.workdir)
        return *load_encoder(workdir, options.step), tower_sources(workdir)
    encoder, sources = imported_encoder(options.config)
    for modality, source in sources.items():
        print(f"{modality} tower: {source.source}")
    return encoder, options.config, sources


def _with_tasks(config: ExperimentConfig, chosen: str) -> ExperimentConfig:
    """`config` with the tasks that `--tasks` names."""
    plain = to_plain(config)
    tasks = plain["evaluation"]["tasks"]
    if chosen.endswith(".json"):
        if not Path(chosen).is_file():
            raise ConfigError(f"--tasks={chosen}: there is no such file")
        tasks = json.loads(Path(chosen).read_text(encoding="utf-8"))
    elif chosen:
        names = [name.strip() for name in chosen.split(",")]
        unknown = [name for name in names if name not in tasks]
        if unknown:
            raise ConfigError(f"--tasks={chosen}: no task {unknown[0]!r}; there are {list(tasks)}")
        tasks = {name: tasks[name] for name in names}
    if not tasks:
        raise ConfigError("there are no tasks: name a JSON file of tasks in --tasks")
    plain["evaluation"]["tasks"] = tasks
    return from_config_dict(plain)


def _run_tasks(options: Options, kept: KeptRows, config: ExperimentConfig) -> None:
    from cwcl_jax.evaluation.report import terminal_report
    from cwcl_jax.evaluation.tasks import run_tasks
    from cwcl_jax.training.distributed import is_primary

    results = run_tasks(
        config.evaluation,
        encode=kept.encode,
        data=config.data,
        features=partial(kept.encode, output="features"),
    )
    if is_primary():
        baselines = config.evaluation.robustness_baselines
        print(terminal_report(results, baselines_file=baselines))
        _write(options, config, results, kept.encoder.step)


def _write(
    options: Options, config: ExperimentConfig, results: list[TaskResult], step: int
) -> None:
    from cwcl_jax.evaluation.compare import compare_with
    from cwcl_jax.evaluation.report import write_report

    name = Path(options.workdir).resolve().name if options.workdir else f"{config.name}-imported"
    folder = Path(options.output or (Path(options.workdir or f"runs/{name}") / "evaluation"))
    tables, files = [], []
    if options.compare:
        table, files = compare_with(results, name, Path(options.compare), folder)
        print("\n" + table.text())
        tables.append(table)
    files += write_report(
        results,
        folder,
        model=name,
        pretrained=f"step {step}" if options.workdir else "imported",
        more_tables=tables,
        baselines_file=config.evaluation.robustness_baselines,
    )
    print(f"\nwritten to {folder}: {', '.join(str(path.relative_to(folder)) for path in files)}")


def _rank_one(options: Options, encoder: Encoder, config: ExperimentConfig) -> None:
    from cwcl_jax.evaluation.single import rank_classes

    modality, path = ("speech", options.audio) if options.audio else ("image", options.image)
    ranked = rank_classes(
        Path(path),
        modality,
        options.classes.split(","),
        encode=encoder.encode,
        data=config.data,
        templates=options.templates,
    )
    print(ranked.table(path).text())


if __name__ == "__main__":
    _read = define_flags()
    cli.run(lambda argv: evaluate(_read()))
