"""What a caller hands in: one item or many, checked one by one before anything is computed.

Pictures are paths, encoded bytes, PIL images or uint8 arrays (y, x, 3); recordings are paths,
encoded bytes or pairs (samples, rate). An array is whatever NumPy can read, jax's and torch's too.
"""

import numbers
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cwcl_jax.data.skipping import BadExample

# Floats of a recording that was normalised a little carelessly are still below this.
_LOUDEST = 2.0


def listed_pictures(pictures: Any) -> list[Any]:
    """One picture or many, an array of pictures too, as a list."""
    if hasattr(pictures, "__array__") and not isinstance(pictures, Image.Image):
        pictures = np.asarray(pictures)
        return [pictures] if pictures.ndim == 3 else list(pictures)
    if isinstance(pictures, (str, bytes, Path, Image.Image)):
        return [pictures]
    return list(pictures)


def listed_texts(texts: Any) -> list[str]:
    """One text or many as a list; a tuple of two is two texts, not a pair of sentences."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"item {number} of the texts is {text!r}, which is no string")
    return listed


def listed_recordings(recordings: Any) -> list[Any]:
    """One recording or many as a list."""
    if isinstance(recordings, (str, bytes, Path)) or _is_pair(recordings):
        return [recordings]
    return list(recordings)


def _is_pair(item: Any) -> bool:
    """Whether it is (samples, rate), and not a tuple of recordings."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], numbers.Real)


def prepare_each(prepare: Callable[[Any], Any], items: Iterable[Any], first: int) -> list[Any]:
    """`prepare` of every item; an error names the path, or the number counted from `first`."""
    prepared = []
    for number, item in enumerate(items, first):
        name = str(item) if isinstance(item, (str, Path)) else f"item {number}"
        try:
            prepared.append(prepare(item))
        except BadExample as error:
            raise BadExample(error.kind, f"{name}: {error.detail}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return prepared


def open_picture(item: Any) -> bytes | Image.Image:
    """Encoded bytes, or a picture that is not the caller's own."""
    if isinstance(item, (str, Path)):
        return Path(item).read_bytes()
    if isinstance(item, bytes):
        return item
    if isinstance(item, Image.Image):
        try:
            # Of a JPEG that is not decoded yet, the caller would be left with a thumbnail.
            return item.copy()
        except OSError as error:
            raise BadExample("image unreadable", str(error)) from error
    if not hasattr(item, "__array__"):
        raise ValueError(
            "a picture is a path, encoded bytes, a PIL image or a uint8 array (y, x, 3), not "
            f"{type(item).__name__}"
        )
    array = np.asarray(item)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"an image array is uint8 (y, x, 3), not {array.dtype} {array.shape}: convert it"
        )
    return Image.fromarray(array)


def open_recording(item: Any) -> bytes | tuple[np.ndarray, int]:
    """Encoded bytes, or samples (int16, one channel) and their rate."""
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
    """Raises ValueError for samples that would become other sounds than the caller's."""
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
        if not peak <= _LOUDEST:  # which NaN is not either
            raise ValueError(
                f"samples reach {peak:g}: floats are finite and in [-1, 1]; divide those that "
                "stand for 16 bits by 32768"
            )
