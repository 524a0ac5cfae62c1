"""Small files that the tests of sources read."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth coloured picture."""
    rows, columns = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(rows / 9 + columns / 7 + p) for p in phase]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, height: int = 24, width: int = 32) -> bytes:
    """The bytes of a JPEG."""
    return encoded(Image.fromarray(pixels(seed, height, width)), "JPEG", quality=92)


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT):
    """A tar of members in order."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of an img2dataset tar: picture, caption and JSON of each sample."""
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:09d}.jpg", jpeg(number)),
            (f"{number:09d}.txt", f"caption {number}".encode()),
            (f"{number:09d}.json", f'{{"caption": "field {number}", "key": "{number}"}}'.encode()),
        ]
    return members


def tone(seconds: float = 0.1, rate: int = 16_000, pitch: float = 440.0) -> np.ndarray:
    """A sine as int16 samples."""
    times = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * pitch * times) * 12_000).astype(np.int16)


def sound(kind: str = "WAV", seconds: float = 0.1, rate: int = 16_000) -> bytes:
    """The bytes of a sound file."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, rate), rate, format=kind)
    return buffer.getvalue()
