"""wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477) and HuBERT (Hsu et al. 2021, 2106.07447).

Strided convolutions read the samples, 20 ms per frame; a wide grouped convolution adds positions; a
transformer follows. HuBERT is the same function with other training.

The result for a recording equals that of transformers for the recording alone, whatever padding
follows in a batch. transformers' own batches do the same with an attention mask if the convolutions
have layer norms. If the first one has a group norm, its statistics include the padding there, but
not here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.augment import SpeechAugment, augment_waveform
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layers import affine
from cwcl_jax.models.log_mel import SAMPLE_RATE, to_float, valid
from cwcl_jax.models.numerics import activate, dropout
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.speech_frames import only
from cwcl_jax.models.transformer import (
    Block,
    Execution,
    TransformerConfig,
    apply_blocks,
    layer_norm,
    linear,
    make_blocks,
)
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config(SpeechAugment):
    """Sizes and numerics of a wav2vec 2.0, HuBERT or (with more fields) WavLM."""

    conv_widths: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: str = "group"
    """"group": one norm over time behind the first convolution; "layer": one behind each."""
    conv_activation: str = "gelu_erf"
    projection_norm: bool = True
    """A norm between the convolutions and the dense layer after them."""
    position_kernel: int = 128
    position_groups: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    stable_norm: bool = False
    """Norms before each branch and at the end, instead of norms after each branch."""
    normalize_waveform: bool = True
    """Normalise samples to mean 0 and variance 1 over the recording, if the weights were trained
    so.
    """
    dropout: float = 0.0
    pooling: str = "mean"
    """"mean" over the recording's frames, or "cls", the first one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.conv_widths) == len(self.kernels) == len(self.strides) > 0:
            raise ValueError(
                f"conv_widths {self.conv_widths}, kernels {self.kernels} and strides "
                f"{self.strides} must have equal lengths"
            )
        if self.conv_norm not in ("group", "layer"):
            raise ValueError(f"conv_norm is 'group' or 'layer', not {self.conv_norm!r}")
        if self.time_masks or self.frequency_masks:
            raise ValueError(
                "time_masks and frequency_masks are of spectrograms, and this encoder reads the "
                "waveform: leave them out; gain_db, noise_db and speed apply"
            )

    @property
    def least_samples(self) -> int:
        """Number of samples that one frame reads."""
        size = 1
        for kernel, stride in zip(self.kernels[::-1], self.strides[::-1], strict=True):
            size = (size - 1) * stride + kernel
        return size


BASE = Wav2Vec2Config()
LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
STABLE = {"conv_norm": "layer", "conv_bias": True, "stable_norm": True}
XLARGE: dict[str, Any] = {"width": 1280, "depth": 48, "heads": 16, "mlp_width": 5120}

# arXiv 2006.11477 section 4.2; XLS-R: arXiv 2111.09296 table 2.
PRESETS = {
    "wav2vec2-base": BASE,
    "wav2vec2-large": dataclasses.replace(BASE, **LARGE),
    "wav2vec2-large-lv60": dataclasses.replace(BASE, **LARGE, **STABLE),
    "XLS-R-300m": dataclasses.replace(BASE, **LARGE, **STABLE),
    "XLS-R-1b": dataclasses.replace(BASE, **XLARGE, **STABLE),
    "XLS-R-2b": dataclasses.replace(
        BASE, **(XLARGE | {"width": 1920, "mlp_width": 7680}), **STABLE
    ),
}
# arXiv 2106.07447 table 1.
HUBERT_PRESETS = {
    "HuBERT-base": BASE,
    "HuBERT-large": dataclasses.replace(BASE, **LARGE, **STABLE),
    "HuBERT-xlarge": dataclasses.replace(BASE, **XLARGE, **STABLE),
}


class WaveConv(nnx.Module):
    """A strided convolution without padding, written as one matmul of shifted copies.

    Kernel: (size, in, out).
    """

    def __init__(
        self, fan_in: int, fan_out: int, size: int, stride: int, *, bias: bool,
        execution: Execution, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        init = nnx.initializers.he_normal(in_axis=(0, 1), out_axis=2)
        self.kernel = nnx.Param(init(rngs.params(), (size, fan_in, fan_out), execution.param_dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((fan_out,), execution.param_dtype))
        self.has_bias = bias
        self.size = size
        self.stride = stride
        self.dtype = execution.dtype

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b u e"]:
        x = x.astype(self.dtype)
        span = (x.shape[1] - self.size) // self.stride * self.stride + 1
        shifted = [x[:, i : i + span : self.stride] for i in range(self.size)]
        kernel = self.kernel[...].reshape(-1, self.kernel.shape[-1])
        bias = self.bias[...] if self.has_bias else None
        return affine(jnp.concatenate(shifted, axis=-1), kernel, bias)


class TimeNorm(nnx.Module):
    """Normalises channels to mean 0 and variance 1 over a recording's real frames, in float32."""

    def __init__(self, width: int, execution: Execution) -> None:
        self.scale = nnx.Param(jnp.ones((width,), execution.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), execution.param_dtype))

    def __call__(
        self, x: Float[Array, "b t d"], frames: Bool[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        plain = only(x.astype(jnp.float32), frames)
        count = jnp.maximum(jnp.sum(frames, axis=1), 1).astype(jnp.float32)[:, None, None]
        mean = jnp.sum(plain, axis=1, keepdims=True) / count
        square = only(jnp.square(plain - mean), frames)
        variance = jnp.sum(square, axis=1, keepdims=True) / count
        plain = (plain - mean) * lax.rsqrt(variance + 1e-5)
        scale, bias = (p[...][None, None].astype(jnp.float32) for p in (self.scale, self.bias))
        return only(plain * scale + bias, frames).astype(x.dtype)


class PositionConv(nnx.Module):
    """A grouped convolution over frames, whose kernel has a learned norm.

    gain (size,) is the norm at each position of direction (size, in / groups, out): the weight
    normalisation of Salimans and Kingma 2016, arXiv 1602.07868.
    """

    def __init__(self, config: Wav2Vec2Config, execution: Execution, *, rngs: nnx.Rngs) -> None:
        width, size, groups = config.width, config.position_kernel, config.position_groups
        init = nnx.initializers.normal(2 / (size * width) ** 0.5)
        direction = init(rngs.params(), (size, width // groups, width), execution.param_dtype)
        self.direction = nnx.Param(direction)
        self.gain = nnx.Param(jnp.linalg.norm(direction.astype(jnp.float32), axis=(1, 2)))
        self.bias = nnx.Param(jnp.zeros((width,), execution.param_dtype))
        self.groups = groups
        self.activation = config.conv_activation

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        direction = self.direction[...].astype(jnp.float32)
        square = jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True)
        gain = self.gain[...].astype(jnp.float32)[:, None, None]
        kernel = direction * gain * lax.rsqrt(square)
        size = kernel.shape[0]
        # An even kernel reads one frame more before a frame than after it.
        y = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=(1,),
            padding=[(size // 2, (size - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return activate(y + self.bias[...][None, None].astype(y.dtype), self.activation)


class Wav2Vec2(nnx.Module):
    """Encoder of {"waveform": int16 (b, n) at 16 kHz, "length": int32 (b,)}."""

    def __init__(self, config: Any, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.execution = execution
        widths = (1, *config.conv_widths)
        self.convs = nnx.List(
            [
                WaveConv(
                    widths[i], widths[i + 1], config.kernels[i], config.strides[i],
                    bias=config.conv_bias, execution=execution, rngs=rngs,
                )
                for i in range(len(config.kernels))
            ]
        )  # fmt: skip
        if config.conv_norm == "group":
            self.conv_norms = nnx.List([TimeNorm(widths[1], execution)])
        else:
            # These norms have their own epsilon.
            self.conv_norms = nnx.List(
                [layer_norm(width, 1e-5, execution, rngs) for width in config.conv_widths]
            )
        if config.projection_norm:
            self.projection_norm = layer_norm(widths[-1], config.epsilon, execution, rngs)
        self.projection = linear(widths[-1], config.width, execution, rngs)
        self.position_conv = PositionConv(config, execution, rngs=rngs)
        norm = layer_norm(config.width, config.epsilon, execution, rngs)
        if config.stable_norm:
            self.norm = norm
        else:
            self.embedding_norm = norm
        self.stack = TransformerConfig.of(
            config, norm_order="pre" if config.stable_norm else "post"
        )
        self.blocks = self.make_blocks(rngs)

    def make_blocks(self, rngs: nnx.Rngs) -> nnx.Pytree:
        """Returns the transformer's layers."""
        return make_blocks(self.stack, self.execution, rngs=rngs, kind=Block)

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def samples(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, "b n"], Int[Array, " b"]]:
        """Returns the samples as in the weights' training, zero after each end, and the ends."""
        config = self.config
        waveform = inputs["waveform"]
        missing = max(0, config.least_samples - waveform.shape[1])
        length = jnp.minimum(inputs["length"], waveform.shape[1])
        x = jnp.where(valid(length, waveform.shape[1]), to_float(waveform), 0.0)
        x, length = augment_waveform(jnp.pad(x, ((0, 0), (0, missing))), length, config, key)
        if config.normalize_waveform:
            real = valid(length, x.shape[1])
            count = jnp.maximum(length, 1).astype(jnp.float32)[:, None]
            x = x - jnp.sum(x, axis=1, keepdims=True) / count
            x = jnp.where(real, x, 0.0)
            variance = jnp.sum(jnp.square(x), axis=1, keepdims=True) / count
            x = x * lax.rsqrt(variance + 1e-7)
        return x, length

    def frames(
        self, samples: Float[Array, "b n"], length: Int[Array, " b"]
    ) -> tuple[Float[Array, "b t d"], Bool[Array, "b t"]]:
        """Returns the output of the convolutions, and which frames read only real samples.

        A recording shorter than one frame has one frame, which also reads silence.
        """
        config = self.config
        x = samples[:, :, None]
        for i, conv in enumerate(self.convs):
            x = conv(x)
            length = jnp.maximum((length - conv.size) // conv.stride + 1, 1)
            real = valid(length, x.shape[1])
            norms: Any = self.conv_norms
            if config.conv_norm == "layer":
                x = norms[i](x)
            elif i == 0:
                x = norms[0](x, real)
            x = activate(x, config.conv_activation)
        return only(x, real), real

    def embed(
        self,
        x: Float[Array, "b t e"],
        frames: Bool[Array, "b t"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns the blocks' input: frames in the transformer's width, with their positions."""
        if self.config.projection_norm:
            x = self.projection_norm(x)
        x = only(self.projection(x), frames)
        x = x + self.position_conv(x)
        if not self.config.stable_norm:
            x = self.embedding_norm(x)
        return dropout(x, self.config.dropout, key)

    def contextualise(
        self, x: Float[Array, "b t d"], frames: Bool[Array, "b t"], key: jax.Array | None
    ) -> Float[Array, "b t d"]:
        """Returns the result of the blocks."""
        return apply_blocks(
            self.blocks, x, frames, config=self.stack, execution=self.execution, key=key
        )

    def tokens(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, "b t d"], Bool[Array, "b t"]]:
        """Returns the sequence that pooling reads, and which of it is real."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x, frames = self.frames(*self.samples(inputs, keys[0]))
        x = self.contextualise(self.embed(x, frames, keys[1]), frames, keys[2])
        return self.norm(x) if self.config.stable_norm else x, frames

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        tokens, frames = self.tokens(inputs, key)
        return pool(tokens, frames, self.config.pooling)


# Names in these files, as transformers writes them. Weight normalisation was renamed once.
LAYER = r"encoder/layers/(\d+)"
OURS = r"encoder/blocks/\1"
_WEIGHT_NORM = r"encoder/pos_conv_embed/conv/(?:parametrizations/weight/)?"
RULES = [
    Rule(r"feature_extractor/conv_layers/(\d+)/conv/(kernel|bias)", r"encoder/convs/\1/\2"),
    Rule(
        r"feature_extractor/conv_layers/(\d+)/layer_norm/(scale|bias)", r"encoder/conv_norms/\1/\2"
    ),
    Rule(r"feature_projection/layer_norm/(scale|bias)", r"encoder/projection_norm/\1"),
    Rule(r"feature_projection/projection/(kernel|bias)", r"encoder/projection/\1"),
    Rule(rf"{_WEIGHT_NORM}(weight_g|original0)", "encoder/position_conv/gain", "flat"),
    Rule(rf"{_WEIGHT_NORM}(weight_v|original1)", "encoder/position_conv/direction", "reversed"),
    Rule(r"encoder/pos_conv_embed/conv/bias", "encoder/position_conv/bias"),
    # The norm after the blocks and the one before them have the same name.
    Rule(r"encoder/layer_norm/(scale|bias)", r"encoder/norm/\1"),
    Rule(r"encoder/layer_norm/(scale|bias)", r"encoder/embedding_norm/\1"),
    *(
        Rule(rf"{LAYER}/attention/{theirs}_proj/(kernel|bias)", rf"{OURS}/attention/{ours}/\2")
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
    ),
    Rule(rf"{LAYER}/layer_norm/(scale|bias)", rf"{OURS}/norm1/\2"),
    Rule(rf"{LAYER}/feed_forward/intermediate_dense/(kernel|bias)", rf"{OURS}/mlp/up/\2"),
    Rule(rf"{LAYER}/feed_forward/output_dense/(kernel|bias)", rf"{OURS}/mlp/down/\2"),
    Rule(rf"{LAYER}/final_layer_norm/(scale|bias)", rf"{OURS}/norm2/\2"),
]
# The vector for masked frames, and the additions of pretraining, CTC and classifiers.
IGNORE = [
    "masked_spec_embed", r"quantizer/.*", r"project_(hid|q)/.*", r"lm_head/.*", r"projector/.*",
    r"classifier/.*", "layer_weights", r"tdnn/.*", r"objective/.*",
]  # fmt: skip
FIRST_CONV = r"feature_extractor[./]conv_layers[./]0[./]conv[./](weight|kernel)"
NAMES = {
    **STACK,
    "conv_bias": "conv_bias",
    "conv_activation": "feat_extract_activation",
    "projection_norm": "feat_proj_layer_norm",
    "position_kernel": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
    "stable_norm": "do_stable_layer_norm",
}
_TUPLES = {"conv_widths": "conv_dim", "kernels": "conv_kernel", "strides": "conv_stride"}


def read_waves(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings of a config.json of this kind.

    Raises:
      ValueError: the model has parts that are not supported.
    """
    parts = ("add_adapter", "adapter_attn_dim", "conv_pos_batch_norm")
    asked = [part for part in parts if content.get(part)]
    if asked:
        raise ValueError(f"{asked[0]}={content[asked[0]]!r} is not supported")
    settings = named(content, names)
    settings |= {ours: tuple(content[key]) for ours, key in _TUPLES.items() if key in content}
    if "feat_extract_norm" in content:
        settings["conv_norm"] = content["feat_extract_norm"]
    return settings


def read_extractor(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a preprocessor_config.json of this kind.

    Raises:
      ValueError: it requires another sampling rate than the one recordings are resampled to.
    """
    rate = content.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise ValueError(f"sampling_rate is {rate}; recordings are resampled to {SAMPLE_RATE}")
    return {"normalize_waveform": bool(content.get("do_normalize", True))}


def layout(name: str, prefix: str) -> Layout:
    """Returns the layout of a model whose task classes put `prefix` before its names."""

    def view(weights: Weights) -> Weights:
        return without_prefix(flax_names(weights), f"{prefix}/")

    return Layout(
        name=name,
        signature=rf"({prefix}[./])?{FIRST_CONV}",
        view=view,
        rules=RULES,
        ignore=IGNORE,
    )


# Both compute the same, so that either name opens either folder.
_KINDS = ("wav2vec2", "hubert")


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    return read_waves(content, NAMES) if content.get("model_type") in _KINDS else {}


WAV2VEC2 = EncoderFamily(
    Wav2Vec2Config,
    Wav2Vec2,
    "speech",
    PRESETS,
    [layout("wav2vec 2.0", "wav2vec2")],
    _read_config,
    read_processor=read_extractor,
    model_types=_KINDS,
)
HUBERT = EncoderFamily(
    Wav2Vec2Config,
    Wav2Vec2,
    "speech",
    HUBERT_PRESETS,
    [layout("HuBERT", "hubert")],
    _read_config,
    read_processor=read_extractor,
    model_types=_KINDS,
)
