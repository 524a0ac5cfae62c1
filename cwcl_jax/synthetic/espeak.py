"""Synthesises speech with espeak-ng in this process, through ctypes: text and voice to int16.

The library comes with the package espeakng-loader (GPL-3, extra `speech`) and is loaded for the
first sentence. It has one global state: calls take turns, and its output depends slightly on what
the process has synthesised before. The output of a fresh process is always the same, because the
noise of breathy voices is seeded here (by default the library seeds it with the time).
"""

import ctypes
import threading
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int16

from cwcl_jax.data.draws import Draws
from cwcl_jax.packages import import_package

VOICES = (
    "en",
    "en-us",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us-nyc",
)
VARIANTS = (
    "", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5",
    "klatt", "klatt2", "klatt3", "klatt4", "Annie", "Alex",
)  # fmt: skip
_TEST_ACCENTS = ("en-gb-scotland", "en-us-nyc")
_TEST_VARIANTS = ("m7", "f4", "klatt3", "Alex")
# The two sets share neither an accent nor a variant.
VOICE_SETS: dict[str, tuple[str, ...]] = {
    "train": tuple(
        f"{name}+{variant}"
        for name in VOICES
        for variant in VARIANTS
        if name not in _TEST_ACCENTS and variant and variant not in _TEST_VARIANTS
    ),
    "test": tuple(f"{name}+{variant}" for name in _TEST_ACCENTS for variant in _TEST_VARIANTS),
}
_RATE, _PITCH, _RANGE = 1, 3, 4
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8_AND_END_PAUSE, _BY_CHARACTER = 2, 0x8000, 0x1001, 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """A way of speaking: a voice, words per minute, pitch and its range (0 to 100)."""

    name: str = "en-us"
    speed: int = 175
    pitch: int = 50
    pitch_range: int = 50


def random_voice(draws: Draws, voices: tuple[str, ...] = VOICES) -> Voice:
    """Returns one of the voices at a natural speed and pitch.

    A variant is added unless the voice's name has one.
    """
    name, variant = draws.pick(voices), draws.pick(VARIANTS)
    return Voice(
        name=f"{name}+{variant}" if variant and "+" not in name else name,
        speed=165 + draws.below(86),
        pitch=20 + draws.below(61),
        pitch_range=30 + draws.below(41),
    )


class _Engine:
    """The loaded library; a process can have only one."""

    def __init__(self):
        loader = import_package("espeakng_loader", "speech", "Synthesised speech")
        self._library = ctypes.CDLL(loader.get_library_path())
        data = loader.get_data_path().encode()
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DO_NOT_EXIT)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start (code {self.rate}); its data: {data!r}.")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._pieces: list[np.ndarray] = []
        # Kept alive, because the library stores only its address.
        self._callback = _CALLBACK(self._take)
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples, count: int, events) -> int:
        del events
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}; try one of {VOICES}.")
        settings = ((_RATE, voice.speed), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range))
        for parameter, value in settings:
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        data = text.encode() + b"\0"
        code = self._library.espeak_Synth(
            data, len(data), 0, _BY_CHARACTER, 0, _UTF8_AND_END_PAUSE, None, None
        )
        if code != 0:
            raise RuntimeError(f"espeak-ng could not synthesise {text!r} (code {code}).")
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)


_lock = threading.Lock()
_engine: _Engine | None = None


def speak(text: str, voice: Voice) -> tuple[Int16[np.ndarray, " n"], int]:
    """Returns the synthesised samples, int16 (n,), and their sampling rate in Hz."""
    global _engine
    with _lock:
        if _engine is None:
            _engine = _Engine()
        return _engine.speak(text, voice), _engine.rate
