"""The table of encoders: the family of each name, its presets, and its settings from a preset.

A user's encoder is named as "module:Class"; see `models.own_encoder`.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.extension import is_reference
from cwcl_jax.models import (
    audio_spectrogram,
    bart,
    bert,
    conv_speech,
    dinov2,
    dinov3,
    modernbert,
    mpnet,
    own_encoder,
    precomputed,
    siglip,
    text,
    vit,
    wav2vec2,
    wavlm,
    whisper,
)
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.transformer import Execution


class EncoderModule(Protocol):
    """The interface of an encoder; without a key it is deterministic."""

    config: Any

    @property
    def feature_width(self) -> int: ...

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]: ...


ENCODERS: dict[str, EncoderFamily] = {
    "vit": vit.VIT,
    "siglip": siglip.SIGLIP,
    "dinov2": dinov2.DINOV2,
    "dinov3": dinov3.DINOV3,
    "text": text.TEXT,
    "siglip_text": siglip.SIGLIP_TEXT,
    "bert": bert.BERT,
    "roberta": bert.ROBERTA,
    "bart": bart.BART,
    "modernbert": modernbert.MODERNBERT,
    "mpnet": mpnet.MPNET,
    "whisper": whisper.WHISPER,
    "wav2vec2": wav2vec2.WAV2VEC2,
    "hubert": wav2vec2.HUBERT,
    "wavlm": wavlm.WAVLM,
    "ast": audio_spectrogram.AST,
    "conv_speech": conv_speech.CONV_SPEECH,
    "precomputed": precomputed.PRECOMPUTED,
}


def encoder_config(encoder: str, preset: str, overrides: Mapping[str, Any], pooling: str) -> Any:
    """Returns the encoder's own settings: its preset (or defaults), then the overrides by name.

    Raises:
      ValueError: there is no such encoder, preset or setting.
    """
    if is_reference(encoder):
        return own_encoder.settings_of(encoder, preset, overrides, pooling)
    family = encoder_family(encoder)
    values: dict[str, Any] = {}
    if preset:
        if preset not in family.presets:
            raise ValueError(unknown(f"preset of encoder {encoder!r}", preset, family.presets))
        values = dataclasses.asdict(family.presets[preset])
    fields = {field.name for field in dataclasses.fields(family.config_class)}
    for name, value in overrides.items():
        if name not in fields:
            raise ValueError(unknown(f"override of encoder {encoder!r}", name, fields))
        # Lists come from JSON files; a static attribute of a module must be hashable.
        values[name] = tuple(value) if isinstance(value, list) else value
    if pooling:
        if "pooling" not in fields:
            raise ValueError(f"encoder {encoder!r} has no pooling; remove pooling={pooling!r}")
        values["pooling"] = pooling
    return family.config_class(**values)


def modality_of(encoder: str) -> str:
    """Returns the name of the modality that an encoder reads.

    Raises:
      ValueError: it is not known, as for a user's encoder.
    """
    if is_reference(encoder):
        raise ValueError(
            f"encoder={encoder!r} does not say what it reads: name a built-in modality (such as "
            "'image'), or 'module:Name' of your own"
        )
    return encoder_family(encoder).modality


def has_blocks(encoder: str) -> bool:
    """Returns whether an encoder is a stack of equal blocks, which can be rematerialised."""
    return not is_reference(encoder) and encoder_family(encoder).has_depth


def fixed_leaves(encoder: str) -> tuple[str, ...]:
    """Returns the paths below a tower that `tune="all"` does not train."""
    return () if is_reference(encoder) else encoder_family(encoder).fixed


def encoder_family(encoder: str) -> EncoderFamily:
    """Returns the table's row of an encoder.

    Raises:
      ValueError: there is no such encoder; the message names the nearest.
    """
    if encoder not in ENCODERS:
        raise ValueError(unknown("encoder", encoder, ENCODERS))
    return ENCODERS[encoder]


def build_encoder(
    encoder: str, config: Any, execution: Execution, arrays: Mapping[str, Any], *, rngs: nnx.Rngs
) -> Any:
    """Returns the module of an encoder.

    Args:
      arrays: shape and dtype of one example's inputs by name.
    """
    if is_reference(encoder):
        return own_encoder.OwnEncoder(encoder, config, execution, arrays, rngs=rngs)
    return encoder_family(encoder).build(config, execution, rngs=rngs)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Returns the message of an error about an unknown name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what}: {name!r}; {hint}known: {', '.join(known) or 'none'}"
