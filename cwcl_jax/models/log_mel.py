"""Log-mel features inside jit: the front end of Whisper (arXiv 2212.04356, section 2.2).

16 kHz, 25 ms periodic Hann windows every 10 ms, power spectra, Slaney mel filters, log10 with a
floor at a fixed distance below the utterance's maximum. Always float32.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SAMPLE_RATE = 16000
WINDOW = 400
HOP = 160
_PART = 80  # divides window and hop, so that frames are concatenated slices and not a gather


@dataclasses.dataclass(frozen=True)
class MelSpec:
    """Settings of the features."""

    bins: int = 80
    low_hz: float = 0.0
    high_hz: float = 8000.0
    dynamic_range: float = 8.0
    """Powers of ten below the maximum at which values are clipped: 8 is 80 dB."""


def frame_count(samples: int) -> int:
    """Returns the number of frames: one starts every 10 ms, none at the very end."""
    return -(-samples // HOP)


def to_float(waveform: Int[Array, "b n"] | Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Returns samples in [-1, 1)."""
    scale = 32768.0 if jnp.issubdtype(waveform.dtype, jnp.integer) else 1.0
    return waveform.astype(jnp.float32) / scale


def valid(length: Int[Array, " b"], size: int) -> Bool[Array, "b n"]:
    """Returns True at the first `length` of `size` positions."""
    return jnp.arange(size)[None, :] < length[:, None]


def log_mel(
    samples: Float[Array, "b n"], frames: Bool[Array, "b t"] | None, spec: MelSpec
) -> Float[Array, "b t f"]:
    """Returns log10 mel powers, clipped at the dynamic range below the maximum over real `frames`.

    Samples after an utterance's end must be zero. With `frames=None` the whole clip is real, and
    its end is reflected as its beginning is (Whisper's 30 s window).
    """
    half = WINDOW // 2
    left = samples[:, 1 : half + 1][:, ::-1]
    right = samples[:, -half - 1 : -1][:, ::-1] if frames is None else jnp.zeros_like(left)
    count = frame_count(samples.shape[1])
    x = jnp.concatenate([left, samples, right], axis=1)
    missing = (count - 1) * HOP + WINDOW - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, max(missing, 0))))
    window = jnp.asarray(np.hanning(WINDOW + 1)[:-1], jnp.float32)
    spectrum = jnp.fft.rfft(windows(x, count) * window[None, None, :], axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = jnp.asarray(mel_filters(spec), jnp.float32)
    mel = jnp.matmul(power, filters, precision="highest")
    values = jnp.log10(jnp.maximum(mel, 1e-10))
    real = values if frames is None else jnp.where(frames[:, :, None], values, -10.0)
    top = jnp.max(real, axis=(1, 2), keepdims=True)
    return jnp.maximum(values, top - spec.dynamic_range)


def windows(x: Float[Array, "b n"], count: int) -> Float[Array, "b t w"]:
    """Returns overlapping windows, concatenated from parts of 5 ms."""
    steps = HOP // _PART
    parts = WINDOW // _PART
    needed = count * steps + parts - steps
    x = x[:, : needed * _PART].reshape(x.shape[0], needed, _PART)
    slices = [x[:, i : i + (count - 1) * steps + 1 : steps] for i in range(parts)]
    return jnp.concatenate(slices, axis=-1)


@functools.cache
def mel_filters(spec: MelSpec) -> Float[np.ndarray, "w f"]:
    """Returns triangular filters of equal area on Slaney's scale.

    The scale is linear to 1 kHz and logarithmic above.
    """
    step = np.log(6.4) / 27.0

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + np.log(hz / 1000) / step

    mels = np.linspace(to_mel(spec.low_hz), to_mel(spec.high_hz), spec.bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    hz = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (hz - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hz) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * 2.0 / (edges[2:] - edges[:-2])
