"""The modalities: one module each for everything that is known about one kind of input."""

import dataclasses
import difflib
import zlib
from typing import Any

from cwcl_jax.extension import import_named, is_reference
from cwcl_jax.modalities.base import ArraySpec, Modality, WrongInputs
from cwcl_jax.modalities.features import FeatureInputs
from cwcl_jax.modalities.image import ImageInputs
from cwcl_jax.modalities.speech import SpeechInputs
from cwcl_jax.modalities.text import TextInputs

__all__ = [
    "MODALITIES",
    "ArraySpec",
    "FeatureInputs",
    "ImageInputs",
    "Modality",
    "SpeechInputs",
    "TextInputs",
    "WrongInputs",
    "modality_class",
    "stream_of",
]

MODALITIES: dict[str, type[Modality]] = {
    kind.name: kind for kind in (ImageInputs, TextInputs, SpeechInputs, FeatureInputs)
}


def modality_class(name: str) -> type[Modality]:
    """Returns a built-in modality by its name, or one of the user's by "module:Name".

    Raises:
      ValueError: there is none of that name, or it is not a modality.
    """
    if not is_reference(name):
        if name not in MODALITIES:
            near = difflib.get_close_matches(name, MODALITIES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown modality {name!r}; {hint}known: {', '.join(MODALITIES)}, or "
                "'module:Name' of a class of your own"
            )
        return MODALITIES[name]
    found: Any = import_named(name, "modality")
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise ValueError(f"modality {name!r} is not a subclass of cwcl_jax.modalities.Modality")
    if not dataclasses.is_dataclass(found) or "__init__" not in vars(found):
        raise ValueError(
            f"modality {name!r} must be a dataclass: @dataclasses.dataclass(frozen=True)"
        )
    return found


def stream_of(tower: str, modality: Modality) -> tuple[int, ...]:
    """Returns the integers that separate a tower's random draws from those of other towers."""
    usual = tower == modality.name
    return (modality.stream,) if usual else (modality.stream, zlib.crc32(tower.encode()))
