"""An experiment's settings: frozen dataclasses, and the one strict conversion into them.

A config file returns an `ml_collections.ConfigDict`, the command line may override its fields,
and `from_config_dict` turns it into an `ExperimentConfig` exactly once. Nothing below the entry
files sees a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from cwcl_jax.data.options import DataConfig
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training.options import (
    CheckpointConfig,
    DistributedConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TemperatureConfig,
)

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a training run.

    Attributes:
      name: the experiment's name; the default workdir is `runs/<name>-<loss>`.
      seed: of initial weights, data order, augmentation and dropout.
      total_steps: optimizer steps.
      global_batch_size: pairs in one step over all devices and processes.
      accumulation_steps: chunks that the towers run over; the loss still sees the whole batch.
      embed_dim: width of the shared embedding space.
      dtype: compute dtype of the towers, "float32" or "bfloat16"; parameters stay float32.
      towers: exactly two, by modality.
    """

    name: str = "experiment"
    seed: int = 0
    total_steps: int = 1000
    global_batch_size: int = 256
    accumulation_steps: int = 1
    embed_dim: int = 128
    dtype: str = "float32"
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
    def modalities(self) -> tuple[str, str]:
        """(U, V): the modality that gives the weights first, then the other one."""
        u = self.loss.weights_from
        (v,) = [modality for modality in self.towers if modality != u]
        return u, v


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError where two settings contradict each other."""
    if len(config.towers) != 2:
        raise ConfigError(
            f"config.towers must name two modalities, got {sorted(config.towers) or 'none'}"
        )
    if config.loss.weights_from not in config.towers:
        raise ConfigError(
            f"config.loss.weights_from={config.loss.weights_from!r} is not one of the towers "
            f"{sorted(config.towers)}"
        )
    for field in ("total_steps", "global_batch_size", "accumulation_steps", "embed_dim"):
        if getattr(config, field) < 1:
            raise ConfigError(f"config.{field} must be at least 1, got {getattr(config, field)}")
    if config.global_batch_size % config.accumulation_steps:
        raise ConfigError(
            f"config.global_batch_size={config.global_batch_size} is not divisible by "
            f"config.accumulation_steps={config.accumulation_steps}"
        )
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"config.dtype must be 'float32' or 'bfloat16', got {config.dtype!r}")


def defaults(cls: type = ExperimentConfig, **values: Any) -> Any:
    """A `ConfigDict` that holds every field of `cls`, so that each can be overridden.

    Args:
      cls: a dataclass of this module, for example `TowerConfig`.
      **values: fields that differ from their defaults.
    """
    result = ConfigDict()
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue  # a required field: the caller gives it in `values`
        result[field.name] = to_plain(value)
        if value is None:  # still to be overridden on a command line, by a value of its type
            (kind, *_) = typing.get_args(typing.get_type_hints(cls)[field.name])
            result[field.name] = config_dict.placeholder(kind)
    known = [field.name for field in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(_unknown(name, known, cls.__name__))
        result[name] = value
    return result


def to_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, all else unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> ExperimentConfig:
    """The frozen form of a ConfigDict.

    Raises:
      ConfigError: an unknown field (names the nearest known one), a value of the wrong type, or
        settings that contradict each other.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    return _convert(ExperimentConfig, plain, "config")


def _unknown(name: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where} has no field {name!r}{hint} (fields: {', '.join(sorted(known))})"


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as an instance of the annotation `kind`; `path` names it in errors."""
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(inner, value, path)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{path} must be a sequence, got {value!r}")
        return tuple(_convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, got {value!r}")
        return {k: _convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    return _convert_scalar(kind, value, path)


def _convert_dataclass(cls: type[T], value: Any, path: str) -> T:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must hold the fields of {cls.__name__}, got {value!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.init]
    for name in value:
        if name not in known:
            raise ConfigError(_unknown(name, known, path))
    arguments = {k: _convert(hints[k], v, f"{path}.{k}") for k, v in value.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise ConfigError(f"{path} must be {kind.__name__}, got {value!r}")
    return value


def to_json(config: ExperimentConfig) -> str:
    """The resolved settings as JSON text; `from_config_dict(json.loads(...))` is its inverse."""
    return json.dumps(to_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ExperimentConfig:
    """The settings that `to_json` wrote."""
    return from_config_dict(json.loads(text))


def config_hash(config: ExperimentConfig) -> str:
    """A short name of the resolved settings, equal on all hosts of one run."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def changed_fields(old: Any, new: Any, path: str = "config") -> list[str]:
    """Dotted paths of the settings in which two experiments (or parts of them) differ."""
    old, new = to_plain(old), to_plain(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        missing = object()
        return [
            changed
            for key in keys
            for changed in changed_fields(
                old.get(key, missing), new.get(key, missing), f"{path}.{key}"
            )
        ]
    old, new = (tuple(v) if isinstance(v, list) else v for v in (old, new))
    return [] if old == new else [path]


def parse_argument(argument: str, **options: Any) -> dict[str, Any]:
    """Options from the part of `--config=file.py:ARGUMENT` behind the colon.

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
            raise ConfigError(_unknown(name, sorted(options), "the config's argument"))
        kind = type(options[name])
        if kind is bool and not separator:
            result[name] = True
            continue
        try:
            result[name] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise ConfigError(f"the config's argument {entry!r}: {wanted} is wanted") from error
    return result
