"""Recordings to int16 waveforms of one rate and one length, with the true length beside them.

Decoding by soundfile (WAV, FLAC, MP3, OGG), resampling by soxr; log-mel features are made on the
device. soundfile and soxr belong to the extra `speech` and are imported when first needed.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int16

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.options import SpeechInputs
from cwcl_jax.data.skipping import BadExample

Audio = bytes | tuple[np.ndarray, int]
# Lossy codecs pass full scale by a little; floats far beyond it were never scaled to it.
_LOUDEST = 8.0
# What the resampling filter sees of a recording beyond the ends of a window.
_EDGE_SECONDS = 0.25


def as_int16(samples: np.ndarray) -> Int16[np.ndarray, " n"]:
    """One channel of int16 from (n,) or (n, channels): the mean of the channels.

    Floats have their full scale at 1, integers at 32768; what is louder is clipped.

    Raises:
      BadExample: values that are no numbers, or that have another scale.
    """
    if samples.dtype == np.int16 and samples.ndim == 1:
        return samples
    floats = np.issubdtype(samples.dtype, np.floating)
    full, most = (32768, _LOUDEST) if floats else (1, 32768)
    peak = np.abs(samples if floats else samples.astype(np.int64)).max(initial=0)
    if not peak <= most:
        raise BadExample(
            "audio unreadable",
            f"the largest of its samples ({samples.dtype}) is {peak}, at most "
            f"{'1' if floats else '32768'} is expected",
        )
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return np.clip(np.rint(mono * full), -32768, 32767).astype(np.int16)


def resample(samples: Int16[np.ndarray, " n"], rate: int, wanted: int) -> Int16[np.ndarray, " m"]:
    """The samples at the wanted rate."""
    if rate == wanted:
        return samples
    return import_package("soxr").resample(samples, rate, wanted, quality="HQ")


def waveform(
    data: Audio, inputs: SpeechInputs, draws: Draws | None = None
) -> dict[str, np.ndarray]:
    """`waveform` (int16, max_seconds long, zeros at its end) and `length` of one recording.

    With `draws`, a recording that is too long gives a random window, otherwise its beginning. No
    more than the window is decoded: hours cost what seconds cost.
    """
    limit = round(inputs.sample_rate * inputs.max_seconds)
    samples = _window(data, inputs, limit, draws if inputs.random_crop else None)
    if len(samples) == 0:
        raise BadExample("audio empty", "no samples")
    padded = np.zeros(limit, np.int16)
    padded[: len(samples)] = samples
    return {"waveform": padded, "length": np.asarray(len(samples), np.int32)}


def _window(
    data: Audio, inputs: SpeechInputs, limit: int, draws: Draws | None
) -> Int16[np.ndarray, " n"]:
    """At most `limit` samples at the wanted rate."""
    with _opened(data) as (frames, rate, read):
        needed = -(-limit * rate // inputs.sample_rate)
        start = draws.below(frames - needed + 1) if draws and frames > needed else 0
        edge = int(_EDGE_SECONDS * rate) if rate != inputs.sample_rate else 0
        before = min(start, edge)
        samples = read(start - before, before + needed + edge)
    if start and len(samples) < before + needed:
        # The file claims more than it holds (a broken end, a stream of unknown length).
        return _window(data, inputs, limit, None)
    skipped = round(before * inputs.sample_rate / rate)
    return resample(samples, rate, inputs.sample_rate)[skipped : skipped + limit]


@contextmanager
def _opened(data: Audio) -> Iterator[tuple[int, int, Callable[[int, int], np.ndarray]]]:
    """Samples in all, their rate, and `read(first, count)`: int16, fewer where they end before."""
    if isinstance(data, tuple):
        samples, rate = data
        yield len(samples), rate, lambda first, count: samples[first : first + count]
        return
    if not data:
        raise BadExample("audio empty", "no bytes")
    soundfile = import_package("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:

            def read(first: int, count: int) -> np.ndarray:
                if first:
                    try:
                        file.seek(first)
                    except RuntimeError:  # beyond what the file really holds
                        return np.zeros(0, np.int16)
                # As floats: libsndfile neither scales those of a file to integers nor clips them.
                return as_int16(file.read(count, dtype="float32", always_2d=True))

            yield file.frames, file.samplerate, read
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        # soundfile's message names the buffer by its address; the reason stands beside it.
        raise BadExample("audio unreadable", getattr(error, "error_string", str(error))) from error


def import_package(name: str):
    """A package of the extra `speech`; an ImportError that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Audio needs the package {name!r}: pip install 'cwcl_jax[speech]'."
        ) from error
