"""Samples of recordings: one channel of int16, resampled by soxr.

soundfile and soxr belong to the extra `speech` and are imported when first needed.
"""

import numpy as np
from jaxtyping import Int16

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.packages import import_package

# Lossy codecs exceed full scale slightly; floats far beyond it were never scaled to [-1, 1].
_LOUDEST = 8.0


def as_int16(samples: np.ndarray) -> Int16[np.ndarray, " n"]:
    """Returns one channel of int16 from (n,) or (n, channels): the mean of the channels.

    Floats have their full scale at 1, integers at 32768; louder values are clipped.

    Raises:
      BadExample: values that are NaN or have another scale.
    """
    if samples.dtype == np.int16 and samples.ndim == 1:
        return samples
    floats = np.issubdtype(samples.dtype, np.floating)
    full, most = (32768, _LOUDEST) if floats else (1, 32768)
    peak = np.abs(samples if floats else samples.astype(np.int64)).max(initial=0)
    if not peak <= most:
        raise BadExample(
            "audio unreadable",
            f"its largest sample ({samples.dtype}) is {peak}; expected at most "
            f"{'1' if floats else '32768'}",
        )
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return np.clip(np.rint(mono * full), -32768, 32767).astype(np.int16)


def resample(samples: Int16[np.ndarray, " n"], rate: int, wanted: int) -> Int16[np.ndarray, " m"]:
    """Returns the samples resampled from `rate` to `wanted`, in Hz."""
    if rate == wanted:
        return samples
    return import_package("soxr", "speech", "Audio").resample(samples, rate, wanted, quality="HQ")
