"""The encoder of Whisper: Radford et al. 2022, arXiv 2212.04356, section 2.2 and table 1.

Whisper always processes 30 s, silence included. Here an utterance may have any length up to 30 s:
its padding is masked in the convolutions, the attention and the pooling, so that it neither costs
nor changes anything. `attend_padding=True` does the same as Whisper, at the cost of 30 s for every
clip.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.augment import SpeechAugment
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layer_names import layer_rules
from cwcl_jax.models.log_mel import HOP, SAMPLE_RATE, MelSpec
from cwcl_jax.models.numerics import activate, dropout
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.speech_frames import FrameConv, masked_frames, only
from cwcl_jax.models.transformer import (
    Execution,
    TransformerConfig,
    apply_blocks,
    layer_norm,
    make_blocks,
)
from cwcl_jax.weights.config_json import ENCODER_STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class WhisperConfig(SpeechAugment):
    """Sizes and numerics of a Whisper encoder."""

    mel_bins: int = 80
    max_positions: int = 1500
    """20 ms each: 1500 are 30 s."""
    width: int = 384
    depth: int = 4
    heads: int = 6
    mlp_width: int = 1536
    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    dropout: float = 0.0
    attend_padding: bool = False
    pooling: str = "mean"

    @property
    def longest(self) -> tuple[str, float]:
        """The field that bounds how much is heard, and the seconds that it allows."""
        return "max_positions", 2 * self.max_positions * HOP / SAMPLE_RATE


def _preset(width: int, depth: int, heads: int, mel_bins: int = 80) -> WhisperConfig:
    return WhisperConfig(
        width=width, depth=depth, heads=heads, mlp_width=4 * width, mel_bins=mel_bins
    )


# arXiv 2212.04356 table 1; large-v3 reads 128 mel bins (its model card).
PRESETS: dict[str, WhisperConfig] = {
    "whisper-tiny": _preset(384, 4, 6),
    "whisper-base": _preset(512, 6, 8),
    "whisper-small": _preset(768, 12, 12),
    "whisper-medium": _preset(1024, 24, 16),
    "whisper-large": _preset(1280, 32, 20),
    "whisper-large-v2": _preset(1280, 32, 20),
    "whisper-large-v3": _preset(1280, 32, 20, mel_bins=128),
    # This package's own size: 5 s, for tests and small experiments.
    "tiny": WhisperConfig(max_positions=250, width=128, depth=3, heads=4, mlp_width=512),
}


class WhisperEncoder(nnx.Module):
    """Encoder of {"waveform": int16 (b, n) at 16 kHz, "length": int32 (b,)}."""

    def __init__(self, config: WhisperConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.conv1 = FrameConv(config.mel_bins, width, 3, execution, rngs=rngs)
        self.conv2 = FrameConv(width, width, 3, execution, stride=2, rngs=rngs)
        table = sinusoids(config.max_positions, width)
        self.position_embedding = nnx.Param(jnp.asarray(table, execution.param_dtype))
        self.stack = TransformerConfig.of(config, norm_order="pre", key_bias=False)
        self.blocks = make_blocks(self.stack, execution, rngs=rngs)
        self.norm = layer_norm(width, config.epsilon, execution, rngs)
        self.config = config
        self.execution = execution

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def frames(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, "b t f"], Bool[Array, "b t"]]:
        """Returns normalised log-mel frames, and which of them are real."""
        samples, limit = inputs["waveform"].shape[1], 2 * self.config.max_positions * HOP
        if samples > limit:
            raise ValueError(
                f"waveforms have {samples} samples ({samples / 16000:.1f} s), the encoder takes "
                f"{limit} ({limit / 16000:.1f} s): lower the data's max_seconds"
            )
        whole = self.config.attend_padding
        if whole:
            waveform = jnp.pad(inputs["waveform"], ((0, 0), (0, limit - samples)))
            inputs = {"waveform": waveform, "length": inputs["length"]}
        spec = MelSpec(bins=self.config.mel_bins)
        features, frames = masked_frames(inputs, spec, self.config, key, hear_silence=whole)
        return (features + 4.0) / 4.0, frames

    def embed(
        self,
        features: Float[Array, "b t f"],
        frames: Bool[Array, "b t"],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "b u d"], Bool[Array, "b u"]]:
        """Returns the result of two convolutions, the second of stride 2, plus the positions."""
        x, frames = self.conv1(features, frames)
        x, frames = self.conv2(activate(x, self.config.activation), frames)
        x = activate(x, self.config.activation)
        positions = self.position_embedding[...][None, : x.shape[1]].astype(jnp.float32)
        x = only((x + positions).astype(x.dtype), frames)
        return dropout(x, self.config.dropout, key), frames

    def tokens(
        self,
        features: Float[Array, "b t f"],
        frames: Bool[Array, "b t"],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "b u d"], Bool[Array, "b u"]]:
        """Returns the sequence after the final norm, from log-mel frames."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x, frames = self.embed(features, frames, keys[0])
        x = apply_blocks(
            self.blocks,
            x,
            None if self.config.attend_padding else frames,
            config=self.stack,
            execution=self.execution,
            key=keys[1],
        )
        return self.norm(x), frames

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        features, real = self.frames(inputs, keys[0])
        # With `attend_padding` silence is attended to, but not averaged.
        heard = jnp.ones_like(real) if self.config.attend_padding else real
        tokens, _ = self.tokens(features, heard, keys[1])
        return pool(tokens, real[:, ::2], self.config.pooling)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "t d"]:
    """Returns Whisper's position table: sines, then cosines, of wavelengths up to 10000."""
    steps = np.log(10000.0) / (width // 2 - 1)
    angles = np.arange(length)[:, None] * np.exp(-steps * np.arange(width // 2))[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "(?:model/)?(?=encoder/|decoder/)")


# Names in Whisper files, as transformers writes them; the decoder is ignored.
_FILES = Layout(
    name="Whisper",
    signature=r"((model[./])?encoder[./])?conv1[./](weight|kernel)",
    view=_view,
    rules=[
        Rule(r"(?:encoder/)?(conv[12])/(kernel|bias)", r"encoder/\1/\2"),
        Rule(r"(?:encoder/)?embed_positions/embedding", "encoder/position_embedding", "top_rows"),
        Rule(r"(?:encoder/)?layer_norm/(scale|bias)", r"encoder/norm/\1"),
        *layer_rules(r"(?:encoder/)?layers/(\d+)"),
    ],
    ignore=[r"decoder/.*", r"proj_out/.*", r"projector/.*", r"classifier/.*"],
)

_NAMES = {
    **ENCODER_STACK,
    "mel_bins": "num_mel_bins",
    "max_positions": "max_source_positions",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    return named(content, _NAMES) if content.get("model_type", "whisper") == "whisper" else {}


WHISPER = EncoderFamily(
    WhisperConfig,
    WhisperEncoder,
    "speech",
    PRESETS,
    [_FILES],
    _read_config,
    # A fixed table of sines, trained only if a regex names it.
    fixed=("encoder/position_embedding",),
    # It was trained on windows of 30 s, with silence after shorter recordings.
    as_published={"attend_padding": True},
    model_types=("whisper",),
)
