"""The runs of each table, figure and ablation at embedded scale, and the metrics read from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from cwcl_jax.config import ConfigError
from cwcl_jax.evaluation.tasks.spoken import Intent, Keywords
from cwcl_jax.reproduction.runs import Run, load_experiment

SCENES = "configs/lit_cwcl.py"
SPEECH = "configs/speech_cwcl.py"
SCENE_TASKS = ("shape", "colour", "combination")


def _joined(*entries: str) -> str:
    return ",".join(filter(None, entries))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table: a metric of a task, measured in all seeds of a run."""

    run: Run
    task: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of our own tables.

    Attributes:
      title: what it shows.
      paper: number of the paper's corresponding table, 0 for none.
      columns: names of the columns.
      rows: method -> its cells, the baseline first.
      about: how it differs from the paper's.
    """

    title: str
    paper: int
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    about: str

    @property
    def runs(self) -> list[Run]:
        """All runs, each once."""
        return list(dict.fromkeys(cell.run for row in self.rows.values() for cell in row))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The changes that the command line makes to every run.

    Attributes:
      steps: number of steps; 0 keeps the config's.
      scenes, speech: additional entries for the configs' arguments, except for the loss.
    """

    steps: int = 0
    scenes: str = ""
    speech: str = ""

    def __post_init__(self):
        for option in ("scenes", "speech"):
            self.refuse(option, "loss", "every table compares CL with CWCL")
            self.refuse(option, "paper", "--scale=paper prints the paper's runs")

    def refuse(self, option: str, name: str, why: str) -> None:
        """Raises ConfigError if the command line sets what an experiment sets in some rows."""
        given = [entry for entry in getattr(self, option).split(",") if entry.split("=")[0] == name]
        if given:
            raise ConfigError(f"--{option}={given[0]}: {why}; leave {name} out")

    def run(self, file: str, name: str, argument: str = "", *options: str, **more) -> Run:
        """Returns a run of a config at this scale."""
        own = self.scenes if file == SCENES else self.speech
        if METHODS["CL"] in argument.split(","):  # CL has no weights to set
            own = _joined(*(e for e in own.split(",") if not e.startswith("weights=")))
        steps = (f"--config.total_steps={self.steps}",) if self.steps else ()
        # What a table varies comes last: of two entries with one name the last one applies.
        return Run(name, file, _joined(own, argument), (*options, *steps), **more)


METHODS = {"CL": "loss=contrastive", "CWCL": ""}
# Seed of the run whose speech encoder counts as pretrained. No other run has it, so that no run
# starts from its own random numbers.
PRETRAINING_SEED = 1000
# What is read from a run: column -> (task, metric).
Read = Mapping[str, tuple[str, str]]


def _by_run(
    title: str, runs: Mapping[str, Run], read: Read, about: str, paper: int = 0
) -> Experiment:
    """Returns an experiment whose rows are runs, all with the same metrics."""
    rows = {name: tuple(Cell(run, *what) for what in read.values()) for name, run in runs.items()}
    return Experiment(title, paper, tuple(read), rows, about)


def _by_column(
    title: str, scale: Scale, columns: Mapping[str, Callable[[str], Run]], about: str, paper: int
) -> Experiment:
    """Returns an experiment whose columns are ways to make a method's run; intents are read."""
    intent = speech_tasks(scale)[0]
    rows = {
        method: tuple(Cell(make(method), intent, "rank@1") for make in columns.values())
        for method in METHODS
    }
    return Experiment(f"{title}, intents, top-1", paper, tuple(columns), rows, about)


def scene_runs(scale: Scale) -> dict[str, Run]:
    """Returns CL and CWCL on scenes."""
    return {
        method: scale.run(SCENES, f"scenes-{method.lower()}", argument)
        for method, argument in METHODS.items()
    }


def _speech(scale: Scale, name: str, *entries: str, after: Run | None = None) -> Run:
    return scale.run(SPEECH, f"speech-{name}", _joined(*entries), after=after)


def _weighted(scale: Scale, weights: str) -> Run:
    return _speech(scale, f"weights-{weights}", f"weights={weights}")


def speech_runs(scale: Scale) -> dict[str, Run]:
    """Returns CL and CWCL on spoken commands, from scratch."""
    return {
        method: _speech(scale, f"scratch-{method.lower()}", argument)
        for method, argument in METHODS.items()
    }


def aligned_runs(scale: Scale) -> dict[str, Run]:
    """Returns CL, CWCL and the recommended weights on spoken commands, for Figures 7 and 8."""
    return {**speech_runs(scale), RECOMMENDED: _weighted(scale, RECOMMENDED)}


def needs(
    wanted: Iterable[Experiment], figures: Iterable[int], scale: Scale
) -> dict[Run, set[str]]:
    """Returns the runs of tables and figures, each with the tasks that are read from it."""
    found: dict[Run, set[str]] = {}
    cells = (cell for experiment in wanted for row in experiment.rows.values() for cell in row)
    for cell in cells:
        found.setdefault(cell.run, set()).add(cell.task)
    drawn = {5: (scene_runs, SCENE_TASKS), 6: (scene_runs, ())}
    for number in figures:
        runs, tasks = drawn.get(number, (aligned_runs, ("alignment",)))
        for run in runs(scale).values():
            found.setdefault(run, set()).update(tasks)
    return found


def check(needed: Mapping[Run, Collection[str]], scale: Scale) -> None:
    """Raises ConfigError, before anything runs, if settings are invalid, unused or lack a task."""
    for option, file in (("scenes", SCENES), ("speech", SPEECH)):
        given = f"--{option}={getattr(scale, option)}"
        runs = [run for run in needed if run.file == file]
        if getattr(scale, option) and not runs:
            raise ConfigError(f"{given}: no table or figure of this command has such runs")
        for run in runs:
            # The encoder to start from does not exist yet.
            argument = _joined(*(e for e in run.argument.split(",") if e != "init={init}"))
            try:
                tasks = load_experiment(file, argument).evaluation.tasks
            except ConfigError as error:
                raise ConfigError(f"{given}: {error}") from error
            missing = sorted(set(needed[run]) - set(tasks))
            if missing:
                raise ConfigError(f"{given}: these settings have no task {missing[0]!r} to read")


def pretrained_speech(scale: Scale) -> Run:
    """Returns the run whose speech encoder counts as pretrained: contrastive, from scratch."""
    # What is locked concerns the runs that start from it.
    locked = ["lock=text"] if "lock=" in scale.speech else []
    run = _speech(scale, "pretraining", "loss=contrastive", *locked)
    return dataclasses.replace(run, seed=PRETRAINING_SEED)


def speech_tasks(scale: Scale) -> list[str]:
    """Returns the names of the config's tasks with classes: intents first, then keywords."""
    tasks = load_experiment(SPEECH, scale.speech).evaluation.tasks
    kinds = (Intent, Keywords)
    names = [[name for name, task in tasks.items() if isinstance(task, kind)] for kind in kinds]
    if not names[0]:
        raise ConfigError(f"--speech={scale.speech}: these settings have no task of kind intent")
    return [name for kind in names for name in kind]


def _class_columns(scale: Scale, metric: str) -> dict[str, tuple[str, str]]:
    """Returns each task with classes, with the data set's templates and with general ones (#).

    Args:
      metric: with a placeholder for the templates' suffix, such as "rank{}@1".
    """
    return {
        task.replace("_", " ") + mark: (task, metric.format(suffix))
        for task in speech_tasks(scale)
        for mark, suffix in (("", ""), ("#", "_general"))
    }


def _retrieval(first: str, second: str, ranks: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """Returns recall in both directions between two modalities, named by their first letters."""
    ways = ((first, second), (second, first))
    return {
        f"{a[0].upper()}->{b[0].upper()} R@{k}": ("retrieval", f"{a}_to_{b}_rank@{k}")
        for a, b in ways
        for k in ranks
    }


def table(number: int, scale: Scale) -> Experiment:
    """Returns the experiment that corresponds to one of the paper's tables."""
    made = {4: _table4, 5: _table5, 6: _table6, 7: _table7, 8: _table8}
    if number not in made:
        raise ConfigError(f"--table={number}: choose one of {', '.join(map(str, made))}")
    return made[number](scale)


def _table4(scale: Scale) -> Experiment:
    source = load_experiment(SCENES, scale.scenes).evaluation.tasks["retrieval"].source
    return _by_run(
        "Retrieval (Table 4)",
        scene_runs(scale),
        _retrieval("image", "text", (1, 5, 10)),
        f"Ours: drawn scenes with captions ({source}). The paper's: MS-COCO validation.",
        4,
    )


def _table5(scale: Scale) -> Experiment:
    scale.refuse("speech", "init", "Table 5 compares initialisations")
    first = pretrained_speech(scale)

    def pretrained(method: str) -> Run:
        name = f"init-{method.lower()}"
        return _speech(scale, name, METHODS[method], "init={init}", after=first)

    return _by_column(
        "Random against pretrained speech encoder (Table 5)",
        scale,
        {"random initialisation": speech_runs(scale).__getitem__, "pretrained": pretrained},
        "Ours: spoken commands of the package's grammar, a small convolutional encoder; pretrained "
        "means trained before with CL under another seed. The paper's: Whisper and SLURP.",
        5,
    )


def _table6(scale: Scale) -> Experiment:
    scale.refuse("speech", "lock", "Table 6 compares what is locked")
    locks = {"none locked": "none", "speech": "speech", "text": "text", "both": "both"}
    steps = (scale.steps or load_experiment(SPEECH, scale.speech).total_steps) // 4
    short = dataclasses.replace(scale, steps=max(1, steps))
    first = pretrained_speech(scale)

    def locked(lock: str) -> Callable[[str], Run]:
        return lambda method: _speech(
            short, f"lock-{lock}-{method.lower()}", METHODS[method], f"lock={lock}", "init={init}",
            after=first,
        )  # fmt: skip

    return _by_column(
        "What is locked (Table 6)",
        scale,
        {name: locked(lock) for name, lock in locks.items()},
        "Ours: every run from the pretrained speech encoder of Table 5, with a quarter of its "
        "steps (a step costs six times as much where the text tower trains). Without "
        "--speech=projection=trained the text side has a projection in the last column only; in "
        "the paper's it probably has one in all.",
        6,
    )


def _table7(scale: Scale) -> Experiment:
    base = load_experiment(SPEECH, scale.speech).global_batch_size

    def sized(size: int) -> Callable[[str], Run]:
        if size == base:
            return speech_runs(scale).__getitem__
        # The config keeps the number of examples; a given number of steps is for the config's
        # batch.
        steps = max(1, scale.steps * base // size) if scale.steps else 0
        fitting = dataclasses.replace(scale, steps=steps)
        return lambda method: _speech(
            fitting, f"batch{size}-{method.lower()}", METHODS[method], f"batch={size}"
        )

    return _by_column(
        "Batch size with the learning rate in proportion (Table 7)",
        scale,
        {f"batch {size}": sized(size) for size in (base // 2, base, 2 * base)},
        "Ours: the same number of examples in every run, as the paper's epochs.",
        7,
    )


def _table8(scale: Scale) -> Experiment:
    runs = speech_runs(scale)
    made = _by_run(
        "Zero-shot intents and keywords, top-5 (Table 8); # general templates",
        runs,
        _class_columns(scale, "rank{}@5"),
        "Ours: spoken commands, MiniLM as text tower; new intents are those never trained on.",
        8,
    )
    texts = _class_columns(scale, "text_rank{}@5").values()
    bound = tuple(Cell(runs["CWCL"], *what) for what in texts)
    return dataclasses.replace(made, rows={**made.rows, "text itself": bound})


# Weight functions by their short names, see `losses.short_names`. uniform uses no similarities.
SCENE_WEIGHTS = {
    "exp0.05": "exp, temperature 0.05",
    "exp0.1": "exp, temperature 0.1",
    "exp0.3": "exp, temperature 0.3",
    "relu1": "relu",
    "relu2": "relu squared",
    "relu4": "relu to the 4th",
    "calibrated0.5": "calibrated, positive pair half",
    "uniform": "uniform (no similarities)",
}
# The weights that configs/RESULTS.md recommends.
RECOMMENDED = "calibrated0.5"
SPEECH_WEIGHTS = ("uniform0.53", "relu2", "calibrated0.5", "calibrated_relu0.5")
_ABLATED = {
    **{task: (task, "rank@1") for task in SCENE_TASKS},
    **_retrieval("image", "text", (1,)),
}


def ablation(kind: str, scale: Scale) -> Experiment:
    """Returns weight functions on scenes or spoken sentences, or batch sizes on scenes."""
    made = {
        "weights": _ablate_weights,
        "speech_weights": _ablate_speech_weights,
        "batch": _ablate_batch,
    }
    if kind not in made:
        raise ConfigError(f"--ablation={kind}: choose one of {', '.join(made)}")
    return made[kind](scale)


def _beside_affine(runs: Mapping[str, Run], more: Mapping[str, Run]) -> dict[str, Run]:
    return {"CL": runs["CL"], "affine (the paper's)": runs["CWCL"], **more}


def _ablate_weights(scale: Scale) -> Experiment:
    scale.refuse("scenes", "weights", "the ablation compares weight functions")
    more = {
        name: scale.run(SCENES, f"scenes-weights-{short}", f"weights={short}")
        for short, name in SCENE_WEIGHTS.items()
    }
    return _by_run(
        "Weight functions, scenes, top-1 and R@1",
        _beside_affine(scene_runs(scale), more),
        _ABLATED,
        "The runs differ only in the function that turns the locked tower's cosines into weights.",
    )


def _ablate_speech_weights(scale: Scale) -> Experiment:
    scale.refuse("speech", "weights", "the ablation compares weight functions")
    more = {name: _weighted(scale, name) for name in SPEECH_WEIGHTS}
    return _by_run(
        "Weight functions, spoken sentences, top-1 and R@1; # general templates",
        _beside_affine(speech_runs(scale), more),
        _class_columns(scale, "rank{}@1") | _retrieval("speech", "text", (1,)),
        "Runs from scratch that differ only in the function that turns the locked tower's cosines "
        "into weights; uniform0.53 uses no similarities.",
    )


def _ablate_batch(scale: Scale) -> Experiment:
    base = load_experiment(SCENES, scale.scenes)
    steps, size = scale.steps or base.total_steps, base.global_batch_size
    runs = {}
    for batch in (size // 4, size // 2, size, 2 * size):
        options = (
            f"--config.global_batch_size={batch}",
            f"--config.optimizer.learning_rate={base.optimizer.learning_rate * batch / size:g}",
            f"--config.optimizer.warmup_steps={base.optimizer.warmup_steps * size // batch}",
            f"--config.total_steps={max(1, steps * size // batch)}",
        )
        for method, run in scene_runs(scale).items():
            if batch != size:
                name = f"scenes-batch{batch}-{method.lower()}"
                run = dataclasses.replace(run, name=name, options=options)
            runs[f"{method}, batch {batch}"] = run
    return _by_run(
        "Batch size with the learning rate in proportion, scenes, top-1 and R@1",
        runs,
        _ABLATED,
        "The same number of examples in every run and in its warm-up.",
    )
