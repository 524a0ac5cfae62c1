"""Recordings to int16 waveforms of one rate and one length, with the true length beside them.

Decoding by soundfile (WAV, FLAC, MP3, OGG), resampling by soxr; log-mel features are made on the
device. soundfile and soxr belong to the extra `speech` and are imported when first needed.
"""

import io

import numpy as np
from jaxtyping import Int16

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.options import SpeechInputs
from cwcl_jax.data.skipping import BadExample

Audio = bytes | tuple[np.ndarray, int]


def decode_audio(data: Audio) -> tuple[np.ndarray, int]:
    """Samples (int16, one channel) and rate of encoded bytes, or of a pair as it is."""
    if isinstance(data, tuple):
        return data
    if not data:
        raise BadExample("audio empty", "no bytes")
    soundfile = _import("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            samples, rate = file.read(dtype="int16", always_2d=True), file.samplerate
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        # soundfile's message names the buffer by its address; the reason stands beside it.
        raise BadExample("audio unreadable", getattr(error, "error_string", str(error))) from error
    if samples.shape[1] == 1:
        return samples[:, 0], rate
    return np.rint(samples.mean(axis=1)).astype(np.int16), rate


def resample(samples: Int16[np.ndarray, " n"], rate: int, wanted: int) -> Int16[np.ndarray, " m"]:
    """The samples at the wanted rate."""
    if rate == wanted:
        return samples
    return _import("soxr").resample(samples, rate, wanted, quality="HQ")


def waveform(
    data: Audio, inputs: SpeechInputs, draws: Draws | None = None
) -> dict[str, np.ndarray]:
    """`waveform` (int16, max_seconds long, zeros at its end) and `length` of one recording.

    With `draws`, a recording that is too long gives a random window, otherwise its beginning.
    """
    samples, rate = decode_audio(data)
    limit = round(inputs.sample_rate * inputs.max_seconds)
    if rate != inputs.sample_rate:
        # Hours need not be resampled to keep some seconds; half a second more serves the filter.
        keep = int((inputs.max_seconds + 0.5) * rate)
        samples = resample(_window(samples, keep, inputs, draws), rate, inputs.sample_rate)
    samples = _window(samples, limit, inputs, draws)
    if len(samples) == 0:
        raise BadExample("audio empty", "no samples")
    padded = np.zeros(limit, np.int16)
    padded[: len(samples)] = samples
    return {"waveform": padded, "length": np.asarray(len(samples), np.int32)}


def _window(
    samples: np.ndarray, limit: int, inputs: SpeechInputs, draws: Draws | None
) -> np.ndarray:
    if len(samples) <= limit:
        return samples
    start = 0
    if draws is not None and inputs.random_crop:
        start = draws.below(len(samples) - limit + 1)
    return samples[start : start + limit]


def _import(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Reading audio needs the package {name!r}: pip install 'cwcl_jax[speech]'."
        ) from error
