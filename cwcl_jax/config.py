"""An experiment's settings: frozen dataclasses, and the one strict conversion into them.

A config file returns an `ml_collections.ConfigDict`, the command line may override its fields, and
`from_config_dict` turns it into an `ExperimentConfig` exactly once. Only the entry files see a
ConfigDict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from cwcl_jax.conversion import (
    ConfigError,
    all_told,
    convert,
    converted,
    each,
    made_of,
    refuse,
    require_known,
    unknown_field,
    variant_of,
    with_all_unknown,
)
from cwcl_jax.data.options import BESIDE, DataConfig
from cwcl_jax.evaluation.files import read_json, user_file
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.extension import is_reference
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.modalities import MODALITIES, Modality, modality_class
from cwcl_jax.models.encoders import modality_of
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.precision import require_precision
from cwcl_jax.training.options import (
    CheckpointConfig,
    DistributedConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TemperatureConfig,
)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that determines a training run.

    Attributes:
      name: the experiment's name; the default workdir is `runs/<name>`. The package's configs
          derive it from their file and argument, see `recipes.experiment_name`.
      seed: seed of initial weights, data order, augmentation and dropout.
      total_steps: optimizer steps.
      global_batch_size: pairs in one step over all devices and processes.
      accumulation_steps: chunks that the towers run over; the loss still sees the whole batch.
      embed_dim: width of the shared embedding space.
      dtype: compute dtype of the towers, "float32" or "bfloat16". Parameters stay float32, except
          for locked kernels during a run, which are stored in this dtype to save memory.
      precision: of the towers' float32 products on accelerators. The default is "highest", so that
          float32 means float32; "high" (three passes of the tensor cores) and "default" (one: TF32
          on GPUs, bfloat16 on TPUs) are faster, dtype="bfloat16" is the fastest. See
          `cwcl_jax.precision`.
      profile: "START:STEPS" writes a trace of this many steps after step START into the workdir's
          folder `profile`, for TensorBoard, XProf or Perfetto; "" for none.
      towers: exactly two, by name. A tower reads its encoder's modality, unless it names one.
    """

    name: str = "experiment"
    seed: int = 0
    total_steps: int = 1000
    global_batch_size: int = 256
    accumulation_steps: int = 1
    embed_dim: int = 128
    dtype: str = "float32"
    precision: str = "highest"
    profile: str = ""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    towers: Mapping[str, TowerConfig] = dataclasses.field(default_factory=dict)
    temperature: TemperatureConfig = dataclasses.field(default_factory=TemperatureConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self):
        check(self)

    @property
    def tower_names(self) -> tuple[str, ...]:
        """The towers in the loss's order: U, which gives the weights, then V."""
        u = self.loss.weights_from
        return (u, *(tower for tower in self.towers if tower != u))


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError with one line for each setting that contradicts another one."""
    refuse([*_contradictions(config)])


def _contradictions(config: ExperimentConfig) -> Iterator[str]:
    if len(config.towers) != 2:
        yield f"config.towers must name two modalities, got {sorted(config.towers) or 'none'}"
    elif config.loss.weights_from not in config.towers:
        yield (
            f"config.loss.weights_from={config.loss.weights_from!r} is not one of the towers "
            f"{sorted(config.towers)}"
        )
    if taken := sorted(set(config.towers) & {"index", *BESIDE}):
        yield (
            f"config.towers.{taken[0]}: a tower cannot have this name; {taken[0]!r} means "
            "something else in a batch"
        )
    counts = ("total_steps", "global_batch_size", "accumulation_steps", "embed_dim")
    for field in counts:
        if getattr(config, field) < 1:
            yield f"config.{field} must be at least 1, got {getattr(config, field)}"
    if config.global_batch_size == 1:
        yield (
            "config.global_batch_size=1 trains nothing: a single pair has no negatives, and the "
            "loss is 0"
        )
    elif config.accumulation_steps > 0 and config.global_batch_size % config.accumulation_steps:
        yield (
            f"config.global_batch_size={config.global_batch_size} is not divisible by "
            f"config.accumulation_steps={config.accumulation_steps}"
        )
    if config.dtype not in ("float32", "bfloat16"):
        yield f"config.dtype must be 'float32' or 'bfloat16', got {config.dtype!r}"
    for name, tower in config.towers.items():
        if tower.dtype not in ("", "float32", "bfloat16"):
            yield (
                f"config.towers.{name}.dtype must be 'float32' or 'bfloat16', or '' for the "
                f"experiment's, got {tower.dtype!r}"
            )
    precisions = {"config": config.precision}
    precisions |= {f"config.towers.{name}": t.precision for name, t in config.towers.items()}
    for path, precision in precisions.items():
        if precision or path == "config":
            yield from _told(f"{path}.precision: ", require_precision, precision)
    yield from _told("", profiled_steps, config)
    yield from _unmeasured(config)


def _told(before: str, check: Callable[[Any], Any], value: Any) -> Iterator[str]:
    """Yields `before` and the message of the ValueError, if the check raises one."""
    try:
        check(value)
    except ValueError as error:
        yield f"{before}{error}"


def _unmeasured(config: ExperimentConfig) -> Iterator[str]:
    """Yields a message if the metric that selects the best step is never measured."""
    name = config.checkpoint.best.rpartition(":")[0]
    kind, _, rest = name.partition("/")
    tasks = list(config.evaluation.tasks)
    missing = ""
    if kind in ("validation", "validation_ema") and not config.data.validates:
        missing = "config.data.validation or config.data.validation_share"
    elif kind == "validation_ema" and not config.optimizer.ema_decay:
        missing = "config.optimizer.ema_decay"
    elif kind == "evaluation" and not tasks:
        missing = "a task in config.evaluation.tasks: there is none, so nothing is evaluated"
    elif kind == "evaluation" and rest.partition("/")[0] not in tasks:
        missing = f"one of the tasks {tasks} in its name, as in evaluation/{tasks[0]}/NUMBER:max"
    elif kind == "evaluation" and not config.evaluation.every_steps:
        missing = "config.evaluation.every_steps"
    if missing:
        yield f"config.checkpoint.best={config.checkpoint.best} needs {missing}"


def profiled_steps(config: ExperimentConfig) -> tuple[int, int] | None:
    """Returns the steps before the trace of `config.profile` and in it, or None."""
    if not config.profile:
        return None
    match = re.fullmatch(r"(\d+):([1-9]\d*)", config.profile)
    if match is None:
        raise ConfigError(
            f"config.profile={config.profile!r} must be START:STEPS, as 10:3 for steps 11 to 13"
        )
    return int(match[1]), int(match[2])


def defaults(cls: type = ExperimentConfig, **values: Any) -> Any:
    """Returns a `ConfigDict` that holds every field of `cls`, so that each can be overridden.

    Args:
      cls: a dataclass of settings, for example `TowerConfig`; or one that stands for several, such
          as `Task`, with the fields that identify the class among `values`.
      **values: fields that differ from their defaults.
    """
    cls, values = variant_of(cls, values, cls.__name__)
    result = ConfigDict()
    if cls is DataConfig:
        result.update(to_plain(DataConfig()))
    for field in dataclasses.fields(cls) if cls is not DataConfig else ():
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue  # a required field: the caller provides it in `values`
        result[field.name] = to_plain(value)
        if value is None:  # may be overridden on a command line, by a value of its type
            (kind, *_) = typing.get_args(typing.get_type_hints(cls)[field.name])
            result[field.name] = config_dict.placeholder(kind)
    known = [*{**result, **{field.name: 0 for field in dataclasses.fields(cls)}}]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(unknown_field(name, known, cls.__name__))
        result[name] = value
    return result


def to_plain(value: Any) -> Any:
    """Returns dataclasses and mappings as dicts, everything else unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        # The options of a tower's inputs are next to the other options: config.data.<tower>.
        return plain | plain.pop("inputs") if isinstance(value, DataConfig) else plain
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> ExperimentConfig:
    """Returns the frozen form of a ConfigDict.

    Raises:
      ConfigError: an unknown field (names the nearest known one), a value of the wrong type, or
          settings that contradict each other; one line for each.
    """
    return with_all_unknown(
        lambda: _from_plain(config.to_dict() if isinstance(config, ConfigDict) else config)
    )


def _from_plain(config: Mapping[str, Any]) -> ExperimentConfig:
    plain = dict(config)
    given = {name: plain.pop(name, {}) for name in ("towers", "data")}
    parts = all_told(
        lambda: _with_data(given["towers"], given["data"]),
        lambda: converted(ExperimentConfig, plain, "config"),
    )
    return made_of(ExperimentConfig, {**parts[0], **parts[1]}, "config")


def _with_data(towers: Any, data: Any) -> dict[str, Any]:
    """Returns the converted fields `towers` and `data`; the towers decide the types of inputs."""
    made = convert(Mapping[str, TowerConfig], towers, "config.towers")
    inputs = _with_inputs(data, made)
    return {"towers": made, "data": convert(DataConfig, inputs, "config.data")}


def _with_inputs(data: Any, towers: Mapping[str, TowerConfig]) -> Any:
    """Returns the data options with the towers' inputs, converted by each tower's modality."""
    if not isinstance(data, Mapping):
        return data
    own = {field.name for field in dataclasses.fields(DataConfig)} - {"inputs"}
    kinds = MODALITIES | {name: _modality(name, tower) for name, tower in towers.items()}
    require_known(data, [*own, *kinds], "config.data")
    used = [name for name, kind in kinds.items() if name in towers or kind().field]
    inputs = each(
        lambda name: convert(kinds[name], _given(data, name, kinds[name]), f"config.data.{name}"),
        used,
    )
    inputs |= {name: inputs[name].fitted(tower.overrides) for name, tower in towers.items()}
    return {k: v for k, v in data.items() if k in own} | {"inputs": inputs}


def _given(data: Mapping[str, Any], name: str, kind: type[Modality]) -> Any:
    """Returns the options of a tower, without those that are there only because of its name.

    `defaults` gives the built-in modalities their options; a tower called "image" that reads
    features does not need a size.
    """
    given, usual = data.get(name, {}), MODALITIES.get(name, kind)
    if usual is kind or not isinstance(given, Mapping):
        return given
    known = {field.name for field in dataclasses.fields(kind)} - {"field"}
    unchanged = to_plain(usual())
    return {
        option: value
        for option, value in given.items()
        if option in known or option not in unchanged or value != unchanged[option]
    }


def _modality(name: str, tower: TowerConfig) -> type[Modality]:
    """Returns the modality of a tower: the one it names, or that of its encoder."""
    try:
        return modality_class(tower.modality or modality_of(tower.encoder))
    except ValueError as error:
        field = "modality" if tower.modality or is_reference(tower.encoder) else "encoder"
        raise ConfigError(f"config.towers.{name}.{field}: {error}") from error


def with_tasks(config: ExperimentConfig, chosen: str) -> ExperimentConfig:
    """Returns `config` with the tasks that `--tasks` names."""
    plain = to_plain(config)
    tasks = plain["evaluation"]["tasks"]
    if chosen.endswith(".json"):
        tasks = _tasks_of_file(chosen)
    elif chosen:
        names = [name.strip() for name in chosen.split(",")]
        unknown = [name for name in names if name not in tasks]
        if unknown:
            raise ConfigError(
                f"--tasks={chosen}: unknown task {unknown[0]!r}; the tasks are {list(tasks)}"
            )
        tasks = {name: tasks[name] for name in names}
    if not tasks:
        raise ConfigError("there are no tasks: name a JSON file of tasks in --tasks")
    plain["evaluation"]["tasks"] = tasks
    return from_config_dict(plain)


def _tasks_of_file(name: str) -> Any:
    try:
        file = user_file(name)
        if not file.is_file():
            raise ConfigError(f"--tasks={name}: there is no such file")
        return read_json(file)
    except ConfigError:
        raise
    except (PermissionError, ValueError) as error:
        raise ConfigError(f"--tasks={name}: {error}") from error


def to_json(config: ExperimentConfig) -> str:
    """Returns the settings as JSON text; `from_config_dict(json.loads(...))` is its inverse."""
    return json.dumps(to_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ExperimentConfig:
    """Returns the settings that `to_json` wrote."""
    return from_config_dict(json.loads(text))


def config_hash(config: ExperimentConfig) -> str:
    """Returns a short hash of the resolved settings, equal on all hosts of one run."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def parse_argument(argument: str, **options: Any) -> dict[str, Any]:
    """Returns options from the part of `--config=file.py:ARGUMENT` after the colon.

    Args:
      argument: entries separated by commas; `name=value`, or a bare `name` for a flag.
      **options: every option with its default; a bool default marks a flag.

    Raises:
      ConfigError: an unknown option, or a value of another type than its default.
    """
    result = dict(options)
    for entry in filter(None, argument.split(",")):
        name, separator, text = entry.partition("=")
        if name not in options:
            raise ConfigError(unknown_field(name, sorted(options), "the config's argument"))
        kind = type(options[name])
        if kind is bool and not separator:
            result[name] = True
            continue
        if not separator or (not text and options[name] != ""):
            raise ConfigError(f"the config's argument {entry!r}: {name}=VALUE is expected")
        try:
            result[name] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise ConfigError(f"the config's argument {entry!r}: {wanted} is expected") from error
    return result
