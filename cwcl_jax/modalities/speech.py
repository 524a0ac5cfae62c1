"""Decodes recordings to int16 waveforms of one rate and one length, with their true length.

soundfile decodes (WAV, FLAC, MP3, OGG) and soxr resamples; log-mel features are computed on the
device.
"""

import dataclasses
import io
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int16

from cwcl_jax.data.audio import as_int16, resample
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities.base import ENDLESS, ArraySpec, Modality, check_views
from cwcl_jax.packages import import_package

Audio = bytes | tuple[np.ndarray, int]
# Seconds beyond the ends of a window that the resampling filter gets to see.
_EDGE_SECONDS = 0.25
# Largest magnitude of floats from a recording that was normalised only approximately.
_LOUDEST = 2.0
# Peak of a recording (of 32767) below which it is inaudible.
_SILENCE = 8
# Tolerated difference between a listed duration and the file's.
_ROUNDED_SECONDS = 0.1
_FULL_SCALE, _CLIPPED_SHARE = 32_700, 0.01
# One analysis window of the log-mel features; a shorter recording does not fill a frame.
FRAME_SECONDS = 0.025


@dataclasses.dataclass(frozen=True)
class SpeechInputs(Modality):
    """How a recording becomes `waveform` (int16, samples) and `length` (int32, samples).

    Users pass paths, encoded bytes or pairs (samples, rate). Samples are int16, or floats in [-1,
    1], with one channel (n,) or several (n, channels).
    """

    name: ClassVar[str] = "speech"
    stream: ClassVar[int] = 3
    training_only: ClassVar[tuple[str, ...]] = ("random_crop", "views")

    field: str = "audio"
    # The rate of the speech encoders; recordings of any other rate are resampled to it.
    sample_rate: int = 16_000
    max_seconds: float = 10.0
    # Training takes a random window of a recording that is too long; evaluation its beginning.
    random_crop: bool = True
    # Training draws among so many fixed windows of each recording, the first of them evaluation's;
    # 0 = a new random one each time. A feature cache needs a number (configs/README.md).
    views: int = 0
    # Seconds, ascending: batches of similar lengths are padded to one of these or to max_seconds;
    # () pads every batch to max_seconds. Needs a source that knows the durations of its recordings.
    buckets: tuple[float, ...] = ()
    # Number of batches that are sorted by length together.
    bucket_window: int = 8

    def __post_init__(self):
        check_views(self.views, self.random_crop)
        if self.sample_rate != 16_000:
            raise ValueError(
                f"sample_rate={self.sample_rate} must be 16000, the rate that the speech encoders "
                "expect; recordings of any rate are resampled to it."
            )
        if not 1 <= self.sample_rate * self.max_seconds < ENDLESS:
            raise ValueError(f"max_seconds={self.max_seconds} must be a positive number.")
        if any(seconds <= 0 for seconds in self.buckets) or self.bucket_window < 1:
            raise ValueError(
                f"buckets={self.buckets} must be positive seconds, and bucket_window="
                f"{self.bucket_window} at least 1."
            )

    def arrays(self) -> dict[str, ArraySpec]:
        samples = round(self.sample_rate * self.max_seconds)
        return {"waveform": ArraySpec((samples,), "int16"), "length": ArraySpec((), "int32")}

    def prepare(self, value: Any, draws: Draws | None = None) -> dict[str, np.ndarray]:
        return waveform(value, self, draws)

    def listed(self, items: Any) -> list[Any]:
        """Returns one recording or many as a list."""
        if isinstance(items, (str, bytes, Path)) or _is_pair(items):
            return [items]
        return list(items)

    def opened(self, item: Any) -> Audio:
        return open_recording(item)

    def preview(self, value: Any) -> Int16[np.ndarray, " n"]:
        made = waveform(value, self)
        return made["waveform"][: made["length"]]

    def trim(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns waveforms cut to the shortest of the options' lengths that holds them all."""
        longest = int(np.asarray(arrays["length"]).max())
        for seconds in self._all_lengths:
            samples = round(seconds * self.sample_rate)
            if samples >= longest:
                return {**arrays, "waveform": arrays["waveform"][:, :samples]}
        return arrays

    def check(self, settings: Any, *, options: str, overrides: str, imported: bool) -> None:
        del imported
        bound, seconds = getattr(settings, "longest", ("", ENDLESS))
        if self.max_seconds > seconds:
            raise ValueError(
                f"{options}.max_seconds={self.max_seconds:g}, but the tower has positions for "
                f"{seconds:g} s: lower it, or raise {bound} in {overrides}"
            )

    def varies(self, source: Any) -> str:
        durations = source.durations
        fits = durations is not None and bool(durations.max() <= self.max_seconds)
        if not self.random_crop or fits:
            return ""
        return (
            "random_crop=True changes the windows of recordings longer than "
            f"max_seconds={self.max_seconds}; set views to a number of fixed ones, or it to False"
        )

    def remarks(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns remarks on recordings that are nearly inaudible, or clipped."""
        frame = round(FRAME_SECONDS * self.sample_rate)
        length = np.asarray(arrays["length"])
        loudness = np.abs(np.asarray(arrays["waveform"]).astype(np.int32))
        clipped = np.sum(loudness >= _FULL_SCALE, axis=1) > _CLIPPED_SHARE * length
        return {
            f"shorter than one frame ({frame} samples), padded with silence": length < frame,
            "silent": loudness.max(axis=1) < _SILENCE,
            f"clipped: more than {_CLIPPED_SHARE:.0%} of the samples at full scale": clipped,
        }

    def lost(self, value: Any) -> tuple[str, ...]:
        """Returns a remark on a recording of which only a part is used."""
        with _opened(value) as (frames, rate, _):
            longer = frames > (self.max_seconds + FRAME_SECONDS) * rate
        return (f"longer than max_seconds={self.max_seconds:g}, and cut there",) if longer else ()

    @property
    def lengths(self) -> tuple[float, ...]:
        return self._all_lengths if self.buckets else ()

    @property
    def _all_lengths(self) -> tuple[float, ...]:
        """The allowed lengths of a batch in seconds: the buckets below `max_seconds`, and that."""
        shorter = sorted(b for b in set(self.buckets) if b < self.max_seconds)
        return (*shorter, self.max_seconds)

    @property
    def window(self) -> int:
        return self.bucket_window

    def at_length(self, length: float) -> "SpeechInputs":
        return dataclasses.replace(self, max_seconds=length)

    def fitting(self, value: Any, length: float) -> "SpeechInputs":
        with _opened(value) as (frames, rate, _):
            seconds = frames / rate
        # Lists round to hundredths, and compressed files end with some padding.
        if length < self.max_seconds and seconds > length + _ROUNDED_SECONDS:
            raise BadExample(
                "audio longer than listed",
                f"{seconds:.2f} s in a batch of up to {length:g} s: correct the column duration "
                "(seconds), or set buckets=()",
            )
        return self.at_length(length)


def _is_pair(item: Any) -> bool:
    """Returns whether an item is (samples, rate), and not a tuple of recordings."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], numbers.Real)


def waveform(
    data: Audio, inputs: SpeechInputs, draws: Draws | None = None
) -> dict[str, np.ndarray]:
    """Returns `waveform` (int16, max_seconds long, zero-padded) and `length` of one recording.

    With `draws`, a recording that is too long gives a random window, otherwise its beginning. Only
    the window is decoded, so long recordings cost no more than short ones.
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
    """Returns at most `limit` samples at the wanted rate."""
    with _opened(data) as (frames, rate, read):
        needed = -(-limit * rate // inputs.sample_rate)
        start = draws.below(frames - needed + 1) if draws and frames > needed else 0
        edge = int(_EDGE_SECONDS * rate) if rate != inputs.sample_rate else 0
        before = min(start, edge)
        samples = read(start - before, before + needed + edge)
    if start and len(samples) < before + needed:
        # The file declares more samples than it holds (truncated, or a stream of unknown length).
        return _window(data, inputs, limit, None)
    skipped = round(before * inputs.sample_rate / rate)
    return resample(samples, rate, inputs.sample_rate)[skipped : skipped + limit]


@contextmanager
def _opened(data: Audio) -> Iterator[tuple[int, int, Callable[[int, int], np.ndarray]]]:
    """Yields the number of samples, their rate, and `read(first, count)`.

    `read` returns int16 samples, fewer than `count` if the recording ends earlier.
    """
    if isinstance(data, tuple):
        samples, rate = data
        yield len(samples), rate, lambda first, count: samples[first : first + count]
        return
    if not data:
        raise BadExample("audio empty", "no bytes")
    if missing := _missing_bytes(data):
        raise BadExample("audio cut off", f"{missing} bytes of its samples are missing")
    soundfile = import_package("soundfile", "speech", "Audio")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:

            def read(first: int, count: int) -> np.ndarray:
                if first:
                    try:
                        file.seek(first)
                    except RuntimeError:  # beyond the file's actual end
                        return np.zeros(0, np.int16)
                # As floats: libsndfile neither scales a file's floats to integers nor clips them.
                return as_int16(file.read(count, dtype="float32", always_2d=True))

            yield file.frames, file.samplerate, read
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        # soundfile's message contains the buffer's address; the attribute has only the reason.
        reason = getattr(error, "error_string", str(error))
        if data[4:8] == b"ftyp":
            reason = (
                "M4A and MP4 are not supported: write FLAC or WAV, with `ffmpeg -i x.m4a x.flac`"
            )
        raise BadExample("audio unreadable", reason) from error


def _missing_bytes(data: bytes) -> int:
    """Returns how many bytes a WAV file declares but does not hold.

    libsndfile would read it as a shorter file. 0 and the largest number stand for a length that the
    writer did not know, as in a stream.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    position = 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            known = 0 < size < 0xFFFF_0000
            return max(0, position + 8 + size - len(data)) if known else 0
        position += 8 + size + size % 2
    return 0


def open_recording(item: Any) -> bytes | tuple[np.ndarray, int]:
    """Returns encoded bytes, or samples (int16, one channel) and their rate."""
    if isinstance(item, (str, Path)):
        return Path(item).read_bytes()
    if isinstance(item, bytes):
        return item
    if not _is_pair(item):
        raise ValueError(
            "a recording is a path, encoded bytes or a pair (samples, rate), not "
            f"{type(item).__name__}"
        )
    samples, rate = np.asarray(item[0]), int(item[1])
    if rate < 1:
        raise ValueError(f"a recording's rate is a number of samples a second, not {item[1]}")
    _check_samples(samples)
    floats = samples.dtype.kind == "f"
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if floats:
        samples = np.clip(samples.astype(np.float32), -1, 1) * 32767
    return np.rint(samples).astype(np.int16), rate


def _check_samples(samples: np.ndarray) -> None:
    """Raises ValueError for samples that would not be converted faithfully."""
    if samples.dtype != np.int16 and samples.dtype.kind != "f":
        raise ValueError(
            f"samples are int16 or floats in [-1, 1], not {samples.dtype}: convert them"
        )
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > samples.shape[0]):
        raise ValueError(
            f"samples are (n,) or (n, channels), not {samples.shape}: channels come last, "
            "transpose them"
        )
    if samples.dtype.kind == "f" and samples.size:
        peak = np.abs(samples).max()
        if not peak <= _LOUDEST:  # also true for NaN
            raise ValueError(
                f"samples reach {peak:g}: floats are finite and in [-1, 1]; divide those that "
                "stand for 16 bits by 32768"
            )
