"""An encoder family: one row of the table of encoders, defined in the encoder's module."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cwcl_jax.weights.rules import Layout


def _nothing(content: Mapping[str, Any]) -> dict[str, Any]:
    del content
    return {}


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """Everything that the package knows about a kind of encoder.

    Attributes:
      config_class: a frozen dataclass of its own settings.
      build: `build(config, execution, rngs=...)` returns the module.
      modality: name of the modality that it reads.
      presets: settings by the name of a size.
      layouts: the kinds of weight files that can be imported.
      read_config: returns the settings in a config.json next to weights; empty for another model's.
      read_processor: returns the settings in a preprocessor_config.json next to weights.
      fixed: paths below the tower that `tune="all"` does not train.
      model_types: accepted values of model_type in config.json; () accepts all.
      as_published: settings under which imported weights compute the same as their authors' model,
          if the defaults compute something cheaper.
    """

    config_class: type
    build: Callable[..., Any]
    modality: str
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layouts: Sequence[Layout] = ()
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    read_processor: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    fixed: tuple[str, ...] = ()
    as_published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_types: tuple[str, ...] = ()

    @property
    def has_depth(self) -> bool:
        """Whether the encoder is a stack of equal blocks."""
        return any(field.name == "depth" for field in dataclasses.fields(self.config_class))
