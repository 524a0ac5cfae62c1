"""Kaldi's log-mel filter banks inside jit, the input of the Audio Spectrogram Transformer.

16 kHz; 25 ms symmetric Hann windows every 10 ms from the first sample on, only whole windows. The
mean of each window is removed and its high frequencies are raised (pre-emphasis). Then power
spectra of 512 points, triangles on the mel scale between 20 Hz and 8 kHz, and the natural
logarithm. Always float32.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cwcl_jax.models.log_mel import HOP, SAMPLE_RATE, WINDOW, windows

_POINTS = 512
_LOW_HZ = 20.0
_PREEMPHASIS = 0.97
_FLOOR = float(np.finfo(np.float32).eps)


def fbank_frames(samples: int) -> int:
    """Returns the number of frames, i.e. of windows that are completely inside the samples."""
    return max(0, 1 + (samples - WINDOW) // HOP)


def fbank(samples: Float[Array, "b n"], bins: int) -> Float[Array, "b t f"]:
    """Returns log powers of `bins` mel bands for every whole window; needs at least one window."""
    frames = windows(samples, fbank_frames(samples.shape[1]))
    frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    window = jnp.asarray(np.hanning(WINDOW), jnp.float32)[None, None]
    spectrum = jnp.fft.rfft((frames - _PREEMPHASIS * before) * window, n=_POINTS, axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = jnp.asarray(kaldi_filters(bins), jnp.float32)
    return jnp.log(jnp.maximum(jnp.matmul(power, filters, precision="highest"), _FLOOR))


@functools.cache
def kaldi_filters(bins: int) -> Float[np.ndarray, "w f"]:
    """Returns triangular filters on the mel scale 1127 ln(1 + hz / 700), each of height 1."""

    def to_mel(hz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hz / 700.0)

    low, high = to_mel(np.array([_LOW_HZ, SAMPLE_RATE / 2]))
    edges = np.linspace(low, high, bins + 2)
    mels = to_mel(np.linspace(0, SAMPLE_RATE / 2, _POINTS // 2 + 1))[:, None]
    rising = (mels - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - mels) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling))
