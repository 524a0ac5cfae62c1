"""Turns a waveform into masked feature frames; convolutions over frames that ignore padding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.augment import SpeechAugment, augment_waveform, mask_spectrum
from cwcl_jax.models.layers import affine
from cwcl_jax.models.log_mel import HOP, MelSpec, frame_count, log_mel, to_float, valid
from cwcl_jax.models.transformer import Execution


def heard_samples(
    inputs: Mapping[str, Any], augment: SpeechAugment, key: jax.Array | None
) -> tuple[Float[Array, "b n"], Int[Array, " b"]]:
    """Samples of {"waveform": (b, n), "length": (b,)} in [-1, 1), zero behind each end; the ends.

    With a key as `augment` says.
    """
    waveform = inputs["waveform"]
    length = jnp.minimum(inputs["length"], waveform.shape[1])
    samples = jnp.where(valid(length, waveform.shape[1]), to_float(waveform), 0.0)
    return augment_waveform(samples, length, augment, key)


def masked_frames(
    inputs: Mapping[str, Any],
    spec: MelSpec,
    augment: SpeechAugment,
    key: jax.Array | None,
    *,
    hear_silence: bool = False,
) -> tuple[Float[Array, "b t f"], Bool[Array, "b t"]]:
    """Returns log-mel frames of {"waveform": (b, n), "length": (b,)}, and which are real.

    They depend only on the samples before `length`, not on what follows or on the buffer's length.
    With `hear_silence` the whole buffer is one clip, as Whisper reads it: see `log_mel`.
    """
    keys = (None, None) if key is None else jax.random.split(key, 2)
    samples, length = heard_samples(inputs, augment, keys[0])
    frames = valid(-(-length // HOP), frame_count(samples.shape[1]))
    features = log_mel(samples, None if hear_silence else frames, spec)
    return mask_spectrum(features, frames, augment, keys[1]), frames


def only(x: Float[Array, "b t d"], frames: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns x with zeros at padded frames."""
    return jnp.where(frames[:, :, None], x, jnp.zeros_like(x))


class FrameConv(nnx.Module):
    """A convolution over frames, written as one matmul of shifted copies.

    Padded frames are read as zeros and give zeros, so that the result at real frames does not
    depend on how many padded frames follow. Kernel: (size, in, out).
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        size: int,
        execution: Execution,
        *,
        stride: int = 1,
        dilation: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        shape = (size, fan_in, fan_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, execution.param_dtype))
        self.bias = nnx.Param(jnp.zeros((fan_out,), execution.param_dtype))
        self.size = size
        self.stride = stride
        self.dilation = dilation
        self.dtype = execution.dtype

    def __call__(
        self, x: Float[Array, "b t d"], frames: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b u e"], Bool[Array, "b u"]]:
        frames_out = frames[:, :: self.stride]
        count = frames_out.shape[1]
        reach = (self.size - 1) * self.dilation
        before = reach // 2
        last = (count - 1) * self.stride + reach
        x = only(x.astype(self.dtype), frames)
        x = jnp.pad(x, ((0, 0), (before, max(0, last + 1 - before - x.shape[1])), (0, 0)))
        span = (count - 1) * self.stride + 1
        shifted = [
            x[:, i * self.dilation : i * self.dilation + span : self.stride]
            for i in range(self.size)
        ]
        kernel = self.kernel[...].reshape(-1, self.bias.shape[0])
        return affine(jnp.concatenate(shifted, axis=-1), kernel, self.bias[...]), frames_out
