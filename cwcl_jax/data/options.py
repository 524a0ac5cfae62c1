"""Options of the data: which examples, how each modality is prepared, how fast it is read."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ENDLESS = math.inf


def _check(options: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError where a number is outside its range, ends included."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            wanted = f"at least {low}" if high == _ENDLESS else f"between {low} and {high}"
            raise ValueError(f"{name}={value} must be {wanted}.")


@dataclass(frozen=True)
class ImageInputs:
    """How a picture becomes `pixels`: uint8, (size, size, 3). Towers normalise on the device."""

    size: int = 64
    # Smallest share of the picture that a random training crop covers; 0 = no random crop.
    crop_min_area: float = 0.0
    flip: bool = False
    # Larger pictures are skipped and counted before any of their pixels are decoded.
    max_pixels: int = 64_000_000
    # Shorter side before the central crop (256 for ImageNet at 224); 0 = `size`.
    eval_resize: int = 0

    def __post_init__(self):
        _check(self, size=(1, _ENDLESS), crop_min_area=(0, 1), max_pixels=(1, _ENDLESS))
        if self.eval_resize and self.eval_resize < self.size:
            raise ValueError(
                f"eval_resize={self.eval_resize} leaves nothing to cut size={self.size} out of; "
                "make it at least size, or 0 for size itself."
            )


@dataclass(frozen=True)
class TextInputs:
    """How a caption becomes `tokens` and `mask`, both (max_tokens,)."""

    # "" = the package's own small tokenizer; otherwise a folder, a tokenizer.json or a hub name.
    tokenizer: str = ""
    max_tokens: int = 32

    def __post_init__(self):
        _check(self, max_tokens=(1, _ENDLESS))


@dataclass(frozen=True)
class SpeechInputs:
    """How a recording becomes `waveform` (int16, samples) and `length` (samples)."""

    # What the speech encoders hear; recordings of any other rate are resampled to it.
    sample_rate: int = 16_000
    max_seconds: float = 10.0
    # Training takes a random window of a recording that is too long; evaluation its beginning.
    random_crop: bool = True
    # Seconds, ascending: batches of similar lengths, padded to one of these or to max_seconds;
    # () pads every batch to max_seconds. Needs a source that knows how long its recordings are.
    buckets: tuple[float, ...] = ()
    # Batches that are sorted by length together.
    bucket_window: int = 8

    def __post_init__(self):
        if self.sample_rate != 16_000:
            raise ValueError(
                f"sample_rate={self.sample_rate} must be 16000, which the speech encoders take "
                "every waveform for; recordings of any rate are resampled to it."
            )
        if not 1 <= self.sample_rate * self.max_seconds < _ENDLESS:
            raise ValueError(f"max_seconds={self.max_seconds} must be a positive number.")
        if any(seconds <= 0 for seconds in self.buckets) or self.bucket_window < 1:
            raise ValueError(
                f"buckets={self.buckets} must be positive seconds, and bucket_window="
                f"{self.bucket_window} at least 1."
            )


@dataclass(frozen=True)
class DataConfig:
    """What a run reads. `train` is a source line: `kind:path?option=value`, mixed with `::`."""

    train: str = "scenes:train"
    # Examples that one epoch draws, without replacement, from all; 0 = all of them.
    examples_per_epoch: int = 0
    shuffle: bool = True
    # What makes two pairs of a batch alike, for losses that go by labels: "class" (the source's
    # labels), "text" (equal captions, whatever their case), "" = pairs carry no label.
    labels: str = ""
    image: ImageInputs = field(default_factory=ImageInputs)
    text: TextInputs = field(default_factory=TextInputs)
    speech: SpeechInputs = field(default_factory=SpeechInputs)
    # Reader threads; 0 = one for each core that this process may use, at most 16.
    threads: int = 0
    # Batches kept ready on the host.
    prefetch: int = 2
    # Where indexes of tars, spoken sentences and locked features are kept; "" = indexes beside the
    # tars, all else in the user's cache folder.
    cache_dir: str = ""
    # Run the locked encoders over the training data once, before the first step, and keep what they
    # give: only for data that is the same in every epoch.
    keep_locked_features: bool = False
    # The run fails when a larger share of the examples read so far was unusable.
    max_skipped_share: float = 0.01

    def __post_init__(self):
        if self.labels not in ("", "class", "text"):
            raise ValueError(f"labels={self.labels!r} is not one of '', 'class', 'text'.")
        _check(
            self,
            examples_per_epoch=(0, _ENDLESS),
            threads=(0, _ENDLESS),
            prefetch=(0, _ENDLESS),
            max_skipped_share=(0, 1),
        )


def cache_home(cache_dir: str = "") -> Path:
    """Where this package keeps what it made: `cache_dir`, or the user's cache folder without it."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "cwcl_jax"
