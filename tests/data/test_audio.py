import contextlib
import io

import numpy as np
import pytest

from cwcl_jax.data.audio import decode_audio, waveform
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.options import SpeechInputs
from cwcl_jax.data.skipping import BadExample
from tests.data.making import sound, tone

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

INPUTS = SpeechInputs(sample_rate=16_000, max_seconds=0.2)


def test_wav_samples_come_back_exactly():
    samples, rate = decode_audio(sound("WAV"))
    assert rate == 16_000
    np.testing.assert_array_equal(samples, tone())


@pytest.mark.parametrize(("kind", "rate"), [("FLAC", 16_000), ("OGG", 16_000), ("MP3", 48_000)])
def test_compressed_formats_are_read(kind, rate):
    made = waveform(sound(kind, 0.15, rate), INPUTS)
    length = int(made["length"])
    # MP3 adds a little padding at both ends.
    assert abs(length - 2400) <= (1200 if kind == "MP3" else 0)
    spectrum = np.abs(np.fft.rfft(made["waveform"][:2400].astype(float)))
    assert abs(np.argmax(spectrum) * 16_000 / 2400 - 440) < 15


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled_to_the_same_tone(rate):
    made = waveform((tone(0.1, rate), rate), INPUTS)
    length = int(made["length"])
    assert abs(length - 1600) <= 2
    inner = slice(200, 1400)
    np.testing.assert_allclose(
        made["waveform"][inner].astype(float), tone().astype(float)[inner], atol=150
    )


def test_short_recordings_end_in_zeros_and_tell_their_length():
    made = waveform((tone(0.05), 16_000), INPUTS)
    assert made["waveform"].shape == (3200,)
    assert made["waveform"].dtype == np.int16
    assert made["length"] == 800
    assert made["length"].dtype == np.int32
    assert not made["waveform"][800:].any()


def test_long_recordings_are_cut_at_the_start_or_at_random():
    samples = tone(1.0)
    np.testing.assert_array_equal(waveform((samples, 16_000), INPUTS)["waveform"], samples[:3200])
    crops = [waveform((samples, 16_000), INPUTS, Draws(k))["waveform"] for k in range(6)]
    assert len({crop.tobytes() for crop in crops}) > 4
    first = SpeechInputs(max_seconds=0.2, random_crop=False)
    cut = waveform((samples, 16_000), first, Draws(3))
    np.testing.assert_array_equal(cut["waveform"], samples[:3200])


def test_a_long_recording_of_another_rate_is_cut_to_full_length():
    made = waveform((tone(3.0, 44_100), 44_100), INPUTS, Draws(0))
    assert made["length"] == 3200


def test_channels_are_averaged():
    buffer = io.BytesIO()
    stereo = np.stack([tone(), np.zeros_like(tone())], axis=1)
    soundfile.write(buffer, stereo, 16_000, format="WAV")
    samples, _ = decode_audio(buffer.getvalue())
    np.testing.assert_allclose(samples, tone() / 2, atol=1)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "audio empty"),
        (b"noise", "audio unreadable"),
        ((np.zeros(0, np.int16), 16_000), "audio empty"),
        ((np.zeros(0, np.int16), 48_000), "audio empty"),
    ],
)
def test_unusable_recordings_are_bad_examples(data, kind):
    with pytest.raises(BadExample) as caught:
        waveform(data, INPUTS)
    assert caught.value.kind == kind
    assert "0x" not in str(caught.value)  # reasons, not addresses of buffers


def test_a_file_without_samples_is_a_bad_example():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0, np.int16), 16_000, format="WAV")
    with pytest.raises(BadExample, match="audio empty"):
        waveform(buffer.getvalue(), INPUTS)


def test_random_damage_never_ends_the_run():
    whole = bytearray(sound("FLAC", 0.3))
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(256)
        with contextlib.suppress(BadExample):
            assert waveform(bytes(data), INPUTS)["waveform"].shape == (3200,)


def test_clipped_and_silent_recordings_are_taken_as_they_are():
    clipped = np.clip(tone(0.1).astype(int) * 50, -32768, 32767).astype(np.int16)
    made = waveform((clipped, 8_000), SpeechInputs(max_seconds=0.3))
    # Resampling overshoots full scale; it must not wrap around to the other sign.
    inner = made["waveform"][100 : int(made["length"]) - 100].astype(int)
    upsampled = np.repeat(clipped.astype(int), 2)[100 : 100 + len(inner)]
    assert np.mean(np.sign(inner) == np.sign(upsampled)) > 0.95
    silent = waveform((np.zeros(800, np.int16), 16_000), INPUTS)
    assert silent["length"] == 800
    assert not silent["waveform"].any()
