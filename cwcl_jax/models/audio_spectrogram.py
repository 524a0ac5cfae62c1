"""Audio Spectrogram Transformer: Gong et al. 2021, arXiv 2104.01778.

A ViT on the spectrogram of a recording: overlapping square patches after two tokens (DeiT's class
and distillation tokens, arXiv 2012.12877), whose mean is the feature. The input always has the same
length: a shorter recording is padded with frames of zeros, as by the authors, without a mask.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.augment import SpeechAugment, mask_spectrum
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.fbank import fbank, fbank_frames
from cwcl_jax.models.layer_names import vit_rules
from cwcl_jax.models.layers import affine
from cwcl_jax.models.log_mel import HOP, SAMPLE_RATE, WINDOW, valid
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.speech_frames import heard_samples
from cwcl_jax.models.transformer import (
    Execution,
    TransformerConfig,
    apply_blocks,
    layer_norm,
    make_blocks,
)
from cwcl_jax.models.vit import drop_patches
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix

# Number of tokens before the patches.
_FIRST = 2


@dataclasses.dataclass(frozen=True)
class AstConfig(SpeechAugment):
    """Sizes and numerics of an Audio Spectrogram Transformer."""

    mel_bins: int = 128
    max_frames: int = 1024
    """Number of frames, 10 ms each; shorter recordings are padded with zeros."""
    patch_size: int = 16
    frequency_stride: int = 10
    time_stride: int = 10
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_erf"
    epsilon: float = 1e-12
    qkv_bias: bool = True
    dropout: float = 0.0
    patch_dropout: float = 0.0
    """Share of the patches that a training step leaves out, different ones for every recording
    (PaSST, Koutini et al. 2022, arXiv 2110.05069); evaluation uses all patches.
    """
    pooling: str = "cls"
    """"cls" is the mean of the two tokens before the patches; "mean" is over the patches."""
    feature_mean: float = -4.2677393
    feature_std: float = 4.5689974
    """Log powers become (x - mean) / (2 std); the defaults are AudioSet's statistics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > min(self.mel_bins, self.max_frames):
            raise ValueError(
                f"patch_size {self.patch_size} is larger than mel_bins {self.mel_bins} or "
                f"max_frames {self.max_frames}"
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout {self.patch_dropout} is a share from 0 to below 1")
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling of an AST is 'cls' or 'mean', not {self.pooling!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along frequency and along time."""
        sizes = (self.mel_bins, self.frequency_stride), (self.max_frames, self.time_stride)
        rows, columns = ((size - self.patch_size) // stride + 1 for size, stride in sizes)
        return rows, columns

    @property
    def samples(self) -> int:
        """Number of samples that all frames together read."""
        return (self.max_frames - 1) * HOP + WINDOW

    @property
    def longest(self) -> tuple[str, float]:
        """Name of the field that limits the length of a recording, and the limit in seconds."""
        return "max_frames", self.samples / SAMPLE_RATE


# The published models, by the stride of their patches: arXiv 2104.01778, tables 2 and 5.
PRESETS = {
    f"AST-B/{stride}": AstConfig(frequency_stride=stride, time_stride=stride)
    for stride in (10, 12, 14, 16)
}
# One second of speech; mean and standard deviation of Speech Commands.
PRESETS["AST-B-speech-commands"] = AstConfig(
    max_frames=128, feature_mean=-6.845978, feature_std=5.5654526
)


def _overlapping(x: jax.Array, size: int, stride: int, axis: int) -> jax.Array:
    """Returns windows along an axis, whose places are on the next axis; slices, not a gather."""
    reach = (x.shape[axis] - size) // stride * stride + 1
    parts = [jax.lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(size)]
    return jnp.stack(parts, axis=axis + 1)


class SpectrogramPatches(nnx.Module):
    """Overlapping patches times one kernel of shape (frequency, time, 1, width)."""

    def __init__(self, config: AstConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        size = config.patch_size
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        shape = (size, size, 1, config.width)
        self.kernel = nnx.Param(init(rngs.params(), shape, execution.param_dtype))
        self.bias = nnx.Param(jnp.zeros((config.width,), execution.param_dtype))
        self.strides = (config.frequency_stride, config.time_stride)
        self.size = size
        self.dtype = execution.dtype

    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b s d"]:
        x = x.astype(self.dtype).transpose(0, 2, 1)
        x = _overlapping(x, self.size, self.strides[0], 1)
        x = _overlapping(x, self.size, self.strides[1], 3)
        b, rows, size, columns, _ = x.shape
        x = x.transpose(0, 1, 3, 2, 4).reshape(b, rows * columns, size * size)
        kernel = self.kernel[...].reshape(size * size, -1)
        return affine(x, kernel, self.bias[...])


class SpectrogramTransformer(nnx.Module):
    """Encoder of {"waveform": int16 (b, n) at 16 kHz, "length": int32 (b,)}."""

    def __init__(self, config: AstConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.execution = execution
        width, dtype = config.width, execution.param_dtype
        self.patch_embed = SpectrogramPatches(config, execution, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        self.distillation_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        shape = (1, _FIRST + config.grid[0] * config.grid[1], width)
        draw = nnx.initializers.normal(0.02)
        self.position_embedding = nnx.Param(draw(rngs.params(), shape, dtype))
        bias = config.qkv_bias
        self.stack = TransformerConfig.of(
            config, norm_order="pre", query_value_bias=bias, key_bias=bias
        )
        self.blocks = make_blocks(self.stack, execution, rngs=rngs)
        self.norm = layer_norm(width, config.epsilon, execution, rngs)

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def frames(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b t f"]:
        """Returns normalised filter banks of `max_frames` frames, padded with frames of zeros.

        Raises:
          ValueError: the waveforms are longer than the frames.
        """
        config = self.config
        if inputs["waveform"].shape[1] > config.samples:
            field, seconds = config.longest
            raise ValueError(
                f"waveforms have {inputs['waveform'].shape[1]} samples, and {field}="
                f"{config.max_frames} reads {config.samples} ({seconds:.3f} s): lower the data's "
                "max_seconds"
            )
        keys = (None, None) if key is None else jax.random.split(key, 2)
        samples, length = heard_samples(inputs, config, keys[0])
        samples = jnp.pad(samples, ((0, 0), (0, max(0, WINDOW - samples.shape[1]))))
        count = fbank_frames(samples.shape[1])
        real = valid(1 + (length - WINDOW) // HOP, count)
        features = jnp.where(real[:, :, None], fbank(samples, config.mel_bins), 0.0)
        features = mask_spectrum(features, real, config, keys[1])
        features = jnp.pad(features, ((0, 0), (0, config.max_frames - count), (0, 0)))
        return (features - config.feature_mean) / (2.0 * config.feature_std)

    def embed(
        self, features: Float[Array, "b t f"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the two tokens and the patches, with their positions; a key may drop patches.

        Patches of one frequency band are next to each other, in the order of time.
        """
        # Sum and broadcast in float32, so that gradients over the batch are summed in float32, too.
        x = self.patch_embed(features).astype(jnp.float32)
        first = [
            jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            for token in (self.class_token, self.distillation_token)
        ]
        x = jnp.concatenate([*first, x], axis=1) + self.position_embedding[...].astype(x.dtype)
        if key is not None and self.config.patch_dropout:
            # A separate key, because `dropout` below uses `key` itself.
            own = jax.random.fold_in(key, 1)
            x = drop_patches(x, self.config.patch_dropout, own, first=_FIRST)
        return dropout(x.astype(self.execution.dtype), self.config.dropout, key)

    def tokens(
        self, features: Float[Array, "b t f"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the sequence after the final norm, computed from filter banks."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x = apply_blocks(
            self.blocks,
            self.embed(features, keys[0]),
            None,
            config=self.stack,
            execution=self.execution,
            key=keys[1],
        )
        return self.norm(x)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        tokens = self.tokens(self.frames(inputs, keys[0]), keys[1])
        pooled = tokens[:, :_FIRST] if self.config.pooling == "cls" else tokens[:, _FIRST:]
        return jnp.mean(pooled, axis=1)


# Names in these files, as transformers writes them: published ones, then those of newer versions.
_L = r"(?:encoder/layer|layers)/(\d+)"


def _view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "audio_spectrogram_transformer/")


_FILES = Layout(
    name="Audio Spectrogram Transformer",
    signature=r"(audio_spectrogram_transformer[./])?embeddings[./]distillation_token",
    view=_view,
    rules=[
        Rule(r"embeddings/cls_token", "encoder/class_token"),
        Rule(r"embeddings/distillation_token", "encoder/distillation_token"),
        Rule(r"embeddings/position_embeddings", "encoder/position_embedding"),
        Rule(r"embeddings/patch_embeddings/projection/(kernel|bias)", r"encoder/patch_embed/\1"),
        *vit_rules(_L),
        Rule(r"layernorm/(scale|bias)", r"encoder/norm/\1"),
    ],
    # The classifier of 527 sounds, or of 35 words.
    ignore=[r"classifier/.*"],
)

_NAMES = {
    **STACK,
    "patch_size": "patch_size",
    "qkv_bias": "qkv_bias",
    "frequency_stride": "frequency_stride",
    "time_stride": "time_stride",
    "max_frames": "max_length",
    "mel_bins": "num_mel_bins",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    return named(content, _NAMES)


def _read_extractor(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns mean and standard deviation of the filter banks.

    Raises:
      ValueError: it requires another rate than that to which recordings are resampled.
    """
    rate = content.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise ValueError(f"sampling_rate is {rate}; recordings are resampled to {SAMPLE_RATE}")
    if not content.get("do_normalize", True):
        return {"feature_mean": 0.0, "feature_std": 0.5}
    return named(content, {"feature_mean": "mean", "feature_std": "std"})


AST = EncoderFamily(
    AstConfig,
    SpectrogramTransformer,
    "speech",
    PRESETS,
    [_FILES],
    _read_config,
    read_processor=_read_extractor,
    model_types=("audio-spectrogram-transformer",),
)
