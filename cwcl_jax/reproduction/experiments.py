"""Which runs each table, figure and ablation needs at embedded scale, and what is read there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cwcl_jax.config import ConfigError
from cwcl_jax.reproduction.paper import TABLES
from cwcl_jax.reproduction.runs import Run, load_experiment

SCENES = "configs/lit_cwcl.py"
SPEECH = "configs/speech_cwcl.py"
SCENE_TASKS = ("shape", "colour", "combination")


def _joined(*entries: str) -> str:
    return ",".join(filter(None, entries))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number: of a run (any seed), a task and a metric; see `measures.measure`."""

    run: Run
    task: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table of our own.

    Attributes:
      title: what it shows.
      paper: the number of the paper's table beside it, 0 for none.
      columns: their names.
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
        """Every run once."""
        return list(dict.fromkeys(cell.run for row in self.rows.values() for cell in row))


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the command line changes in every run.

    Attributes:
      steps: 0 leaves the config's.
      scenes, speech: more entries for the configs' arguments, but for the loss.
    """

    steps: int = 0
    scenes: str = ""
    speech: str = ""

    def __post_init__(self):
        for option in ("scenes", "speech"):
            self.refuse(option, "loss", "every table compares CL with CWCL")

    def refuse(self, option: str, name: str, why: str) -> None:
        """Raises ConfigError where the command line sets what an experiment sets in some rows."""
        given = [entry for entry in getattr(self, option).split(",") if entry.split("=")[0] == name]
        if given:
            raise ConfigError(f"--{option}={given[0]}: {why}; leave {name} out")

    def run(self, file: str, name: str, argument: str = "", *options: str, **more) -> Run:
        """A run of a config at this scale."""
        own = self.scenes if file == SCENES else self.speech
        steps = (f"--config.total_steps={self.steps}",) if self.steps else ()
        # What a table varies comes last: the last of two entries of one name holds.
        return Run(name, file, _joined(own, argument), (*options, *steps), **more)


METHODS = {"CL": "loss=contrastive", "CWCL": ""}


def table(number: int, scale: Scale) -> Experiment:
    """The experiment that stands for one of the paper's tables."""
    made = {4: _table4, 5: _table5, 6: _table6, 7: _table7, 8: _table8}
    if number not in made:
        raise ConfigError(f"--table={number}: choose one of {', '.join(map(str, made))}")
    return made[number](scale)


def scene_runs(scale: Scale) -> dict[str, Run]:
    """CL and CWCL on scenes."""
    return {
        method: scale.run(SCENES, f"scenes-{method.lower()}", argument)
        for method, argument in METHODS.items()
    }


def _table4(scale: Scale) -> Experiment:
    columns = [(way, k) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return Experiment(
        "Retrieval (Table 4)",
        4,
        TABLES[4].columns,
        {
            method: tuple(Cell(run, "retrieval", f"{way}_rank@{k}") for way, k in columns)
            for method, run in scene_runs(scale).items()
        },
        "Ours: 1,000 drawn scenes with captions. The paper's: MS-COCO validation.",
    )


def _speech(scale: Scale, name: str, *entries: str, after: Run | None = None, options=()) -> Run:
    return scale.run(SPEECH, f"speech-{name}", _joined(*entries), *options, after=after)


def pretrained_speech(scale: Scale) -> Run:
    """The run whose speech encoder counts as pretrained: plain contrastive, from scratch.

    Its seed is none of the others', so that no run starts from its own random numbers.
    """
    run = _speech(scale, "pretraining", "loss=contrastive")
    return dataclasses.replace(run, seed=1000)


def speech_tasks(scale: Scale) -> list[str]:
    """Names of the config's tasks with classes: intents first, then keywords."""
    tasks = load_experiment(SPEECH, scale.speech).evaluation.tasks
    names = [[n for n, task in tasks.items() if task.kind == k] for k in ("intent", "keywords")]
    if not names[0]:
        raise ConfigError(f"--speech={scale.speech}: these settings have no task of kind intent")
    return [name for kind in names for name in kind]


def _from_scratch(scale: Scale, method: str) -> Run:
    return _speech(scale, f"scratch-{method.lower()}", METHODS[method])


def _from_pretrained(scale: Scale, method: str) -> Run:
    first = pretrained_speech(scale)
    return _speech(scale, f"init-{method.lower()}", METHODS[method], "init={init}", after=first)


def _locked(scale: Scale, method: str, lock: str) -> Run:
    """From the pretrained encoder, with a quarter of the steps."""
    steps = (scale.steps or load_experiment(SPEECH, scale.speech).total_steps) // 4
    short = dataclasses.replace(scale, steps=max(1, steps))
    entries = METHODS[method], f"lock={lock}", "init={init}"
    name = f"lock-{lock}-{method.lower()}"
    return _speech(short, name, *entries, after=pretrained_speech(scale))


def _table5(scale: Scale) -> Experiment:
    scale.refuse("speech", "init", "Table 5 compares initialisations")
    intent = speech_tasks(scale)[0]
    rows = {
        method: tuple(
            Cell(run, intent, "rank@1")
            for run in (_from_scratch(scale, method), _from_pretrained(scale, method))
        )
        for method in METHODS
    }
    return Experiment(
        "Random against pretrained speech encoder (Table 5), intents, top-1",
        5,
        ("random initialisation", "pretrained"),
        rows,
        "Ours: spoken commands of the package's grammar, a small convolutional encoder; pretrained "
        "means trained before with CL under another seed. The paper's: Whisper and SLURP.",
    )


def _table6(scale: Scale) -> Experiment:
    intent = speech_tasks(scale)[0]
    rows = {
        method: tuple(
            Cell(_locked(scale, method, lock), intent, "rank@1")
            for lock in ("none", "speech", "text", "both")
        )
        for method in METHODS
    }
    return Experiment(
        "What is locked (Table 6), intents, top-1",
        6,
        ("none locked", "speech", "text", "both"),
        rows,
        "Ours: every run from the pretrained speech encoder of Table 5, with a quarter of its "
        "steps (a step costs six times as much where the text tower trains).",
    )


def _table7(scale: Scale) -> Experiment:
    intent = speech_tasks(scale)[0]
    base = load_experiment(SPEECH, scale.speech)
    steps = scale.steps or base.total_steps
    sizes = tuple(base.global_batch_size * factor // 2 for factor in (1, 2, 4))
    rows = {}
    for method, argument in METHODS.items():
        cells = []
        for size in sizes:
            if size == base.global_batch_size:
                cells.append(Cell(_from_scratch(scale, method), intent, "rank@1"))
                continue
            fixed = f"--config.total_steps={max(1, steps * base.global_batch_size // size)}"
            run = dataclasses.replace(
                _speech(scale, f"batch{size}-{method.lower()}", argument, f"batch={size}"),
                options=(fixed,),
            )
            cells.append(Cell(run, intent, "rank@1"))
        rows[method] = tuple(cells)
    return Experiment(
        "Batch size with the learning rate in proportion (Table 7), intents, top-1",
        7,
        tuple(f"batch {size}" for size in sizes),
        rows,
        "Ours: the same number of examples in every run, as the paper's epochs.",
    )


def _table8(scale: Scale) -> Experiment:
    runs = {method: _from_scratch(scale, method) for method in METHODS}
    sets = [(task, suffix) for task in speech_tasks(scale) for suffix in ("", "_general")]
    rows = {
        method: tuple(Cell(run, task, f"rank{suffix}@5") for task, suffix in sets)
        for method, run in runs.items()
    }
    rows["text itself"] = tuple(
        Cell(runs["CWCL"], task, f"text_rank{suffix}@5") for task, suffix in sets
    )
    return Experiment(
        "Zero-shot intents and keywords, top-5 (Table 8); # general templates",
        8,
        tuple(task.replace("_", " ") + "#" * bool(suffix) for task, suffix in sets),
        rows,
        "Ours: spoken commands, MiniLM as text tower; new intents are those never trained on.",
    )


WEIGHTS = {
    "affine (the paper's)": (),
    "exp, temperature 0.05": ("weight_function=exp0.05",),
    "exp, temperature 0.1": ("weight_function=exp0.1",),
    "exp, temperature 0.3": ("weight_function=exp0.3",),
    "relu": ("weight_function=relu1",),
    "relu squared": ("weight_function=relu2",),
    "relu to the 4th": ("weight_function=relu4",),
    "calibrated, own pair half": ("weight_function=calibrated0.5",),
    "uniform (no similarities)": ("name=uniform",),
}


# Names of configs/speech_cwcl.py: the control without similarities, and sharper functions of them.
SPEECH_WEIGHTS = ("uniform0.53", "relu2", "calibrated_relu0.5")


def ablation(kind: str, scale: Scale) -> Experiment:
    """Weight functions on scenes or spoken sentences, or batch sizes on scenes."""
    made = {
        "weights": _ablate_weights,
        "speech_weights": _ablate_speech_weights,
        "batch": _ablate_batch,
    }
    if kind not in made:
        raise ConfigError(f"--ablation={kind}: choose one of {', '.join(made)}")
    return made[kind](scale)


_ABLATED = (
    *((task, "rank@1") for task in SCENE_TASKS),
    ("retrieval", "image_to_text_rank@1"),
    ("retrieval", "text_to_image_rank@1"),
)
_ABLATED_COLUMNS = (*SCENE_TASKS, "I->T R@1", "T->I R@1")


def _ablate_weights(scale: Scale) -> Experiment:
    runs = {"CL": scene_runs(scale)["CL"]}
    for name, options in WEIGHTS.items():
        slug = "-".join(o.split("=")[1] for o in options)
        label = f"scenes-{slug}" if slug else "scenes-cwcl"
        runs[name] = scale.run(SCENES, label, "", *(f"--config.loss.{o}" for o in options))
    return Experiment(
        "Weight functions, scenes, top-1 and R@1",
        0,
        _ABLATED_COLUMNS,
        {name: tuple(Cell(run, *what) for what in _ABLATED) for name, run in runs.items()},
        "The same runs, but for the function that turns the locked tower's cosines into weights.",
    )


def _ablate_speech_weights(scale: Scale) -> Experiment:
    scale.refuse("speech", "weights", "the ablation compares weight functions")
    tasks = speech_tasks(scale)
    read = [(task, f"rank{suffix}@1") for task in tasks for suffix in ("", "_general")]
    read += [("retrieval", f"{way}_rank@1") for way in ("speech_to_text", "text_to_speech")]
    columns = [task.replace("_", " ") + "#" * general for task in tasks for general in (0, 1)]
    runs = {"CL": _from_scratch(scale, "CL"), "affine (the paper's)": _from_scratch(scale, "CWCL")}
    for name in SPEECH_WEIGHTS:
        runs[name] = _speech(scale, f"weights-{name}", f"weights={name}")
    return Experiment(
        "Weight functions, spoken sentences, top-1 and R@1; # general templates",
        0,
        (*columns, "S->T R@1", "T->S R@1"),
        {name: tuple(Cell(run, *what) for what in read) for name, run in runs.items()},
        "From scratch, the same runs but for the function that turns the locked tower's cosines "
        "into weights; uniform0.53 knows no similarities.",
    )


def _ablate_batch(scale: Scale) -> Experiment:
    base = load_experiment(SCENES, scale.scenes)
    steps, size = scale.steps or base.total_steps, base.global_batch_size
    rows = {}
    for batch in (size // 4, size // 2, size, 2 * size):
        options = (
            f"--config.global_batch_size={batch}",
            f"--config.optimizer.learning_rate={base.optimizer.learning_rate * batch / size:g}",
            f"--config.optimizer.warmup_steps={base.optimizer.warmup_steps * size // batch}",
            f"--config.total_steps={max(1, steps * size // batch)}",
        )
        for method, run in scene_runs(scale).items():
            if batch != size:
                run = dataclasses.replace(
                    run, name=f"scenes-batch{batch}-{method.lower()}", options=options
                )
            rows[f"{method}, batch {batch}"] = tuple(Cell(run, *what) for what in _ABLATED)
    return Experiment(
        "Batch size with the learning rate in proportion, scenes, top-1 and R@1",
        0,
        _ABLATED_COLUMNS,
        rows,
        "The same number of examples in every run and in its warm-up.",
    )
