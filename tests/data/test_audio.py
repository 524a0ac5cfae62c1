import contextlib
import io
import math

import numpy as np
import pytest

from cwcl_jax.data.audio import as_int16, resample
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities import SpeechInputs
from cwcl_jax.modalities.speech import waveform
from tests.data.making import sound, tone

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

INPUTS = SpeechInputs(sample_rate=16_000, max_seconds=0.2)
SECOND = SpeechInputs(sample_rate=16_000, max_seconds=1.0)


def _written(samples: np.ndarray, rate: int = 16_000, **kind) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV"} | kind)
    return buffer.getvalue()


def _decoded(data, inputs: SpeechInputs = INPUTS) -> np.ndarray:
    made = waveform(data, inputs)
    return made["waveform"][: made["length"]]


def _noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    """Noise of every level that int16 has."""
    count = round(seconds * rate)
    return np.random.default_rng(0).integers(-32768, 32768, count).astype(np.int16)


def test_wav_samples_come_back_exactly():
    np.testing.assert_array_equal(_decoded(sound("WAV")), tone())
    samples = _noise(0.2)
    for kind in ("WAV", "FLAC", "AIFF"):
        np.testing.assert_array_equal(_decoded(_written(samples, format=kind)), samples)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF"])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE", "PCM_24", "PCM_32"])
def test_floats_and_wide_integers_have_the_level_of_the_same_sound_in_16_bits(kind, subtype):
    samples = _noise(0.1)
    data = _written(samples / 32768, format=kind, subtype=subtype)
    np.testing.assert_array_equal(_decoded(data), samples)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_loud_lossy_recordings_are_clipped_and_never_wrap_around(subtype):
    loud = np.sign(np.sin(np.arange(16_000) / 20)) * 0.99
    data = _written(loud, format="OGG", subtype=subtype)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        exact = file.read(dtype="float64")
    assert np.abs(exact).max() > 1  # or there is nothing to clip
    expected = np.clip(np.rint(exact * 32768), -32768, 32767)
    np.testing.assert_array_equal(_decoded(data, SECOND), expected[:16_000])


@pytest.mark.parametrize("value", [np.nan, np.inf, 20_000.0])
def test_floats_of_no_known_level_are_bad_examples(value):
    data = _written(np.array([0.1, value, 0.2]), format="WAV", subtype="FLOAT")
    with pytest.raises(BadExample, match="its largest sample"):
        waveform(data, INPUTS)


def test_arrays_of_any_type_become_int16():
    samples = _noise(0.05)
    for made in (samples / 32768, (samples / 32768).astype(np.float32), samples.astype(np.int64)):
        np.testing.assert_array_equal(as_int16(made), samples)
    both = np.stack([samples, samples[::-1]], axis=1)
    mean = np.rint(both.astype(float).mean(axis=1))
    np.testing.assert_array_equal(as_int16(both), mean)
    np.testing.assert_array_equal(as_int16(both / 32768), mean)
    with pytest.raises(BadExample, match="int32"):
        as_int16(np.array([1 << 20], np.int32))


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


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_window_of_a_file_is_the_window_of_its_samples(kind):
    samples = _noise(3.0)
    data = _written(samples, format=kind)
    np.testing.assert_array_equal(_decoded(data), samples[:3200])
    starts = []
    for key in range(8):
        made = waveform(data, INPUTS, Draws(key))["waveform"]
        same = waveform((samples, 16_000), INPUTS, Draws(key))["waveform"]
        start = Draws(key).below(len(samples) - 3200 + 1)
        np.testing.assert_array_equal(made, samples[start : start + 3200])
        np.testing.assert_array_equal(made, same)
        starts.append(start)
    assert min(starts) < 12_000
    assert max(starts) > 28_000


@pytest.mark.parametrize("rate", [4_000, 8_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("key", [None, 0, 1, 2])
def test_a_window_is_resampled_as_the_whole_recording_is(rate, key):
    samples = (_noise(4.0, rate) / 4).astype(np.int16)
    made = waveform(_written(samples, rate), SECOND, None if key is None else Draws(key))
    start = 0 if key is None else Draws(key).below(3 * rate + 1)
    # From a sample on that stands where one of the new rate does.
    shift = start % (rate // math.gcd(rate, 16_000))
    whole = resample(samples[shift:], rate, 16_000).astype(int)
    begin = (start - shift) * 16_000 // rate
    # The rounding to int16 is dithered; nothing else differs, at the ends neither.
    np.testing.assert_allclose(made["waveform"], whole[begin : begin + 16_000], atol=2)


def test_of_a_long_recording_no_more_than_the_window_is_read(monkeypatch):
    counts = []
    read = soundfile.SoundFile.read

    def counted(self, frames=-1, **options):
        made = read(self, frames, **options)
        counts.append(len(made))
        return made

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    data = _written(np.zeros((60 * 8_000, 2), np.int16), 8_000, format="FLAC")
    for draws in (None, Draws(1), Draws(2)):
        waveform(data, SECOND, draws)
    assert max(counts) <= 1.5 * 8_000


def test_a_file_that_claims_more_than_it_holds_gives_its_beginning():
    whole = _written(tone(3.0), format="MP3")
    half = whole[: len(whole) // 2]
    made = [waveform(half, INPUTS, Draws(key)) for key in range(8)]
    assert {int(one["length"]) for one in made} == {3200}
    first = waveform(half, INPUTS)["waveform"]
    windows = [one["waveform"] for one in made]
    assert 0 < sum(np.array_equal(window, first) for window in windows) < 8


def test_channels_are_averaged():
    stereo = np.stack([tone(), np.zeros_like(tone())], axis=1)
    np.testing.assert_allclose(_decoded(_written(stereo, format="WAV")), tone() / 2, atol=1)


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
    data = _written(np.zeros(0, np.int16), format="WAV")
    with pytest.raises(BadExample, match="audio empty"):
        waveform(data, INPUTS)


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


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_wav_that_was_cut_off_is_told(share):
    """libsndfile reads what is there, as a shorter recording with the whole caption."""
    whole = _written(_noise(0.5))
    assert len(_decoded(whole, SECOND)) == 8000
    with pytest.raises(BadExample, match="audio cut off"):
        _decoded(whole[: int(share * len(whole))], SECOND)


def test_a_wav_whose_writer_did_not_know_its_length_is_read():
    stream = bytearray(_written(_noise(0.5)))
    place = stream.index(b"data") + 4
    stream[place : place + 4] = b"\xff" * 4
    assert len(_decoded(bytes(stream), SECOND)) == 8000


def test_an_m4a_is_named_with_the_way_out():
    with pytest.raises(BadExample, match=r"M4A and MP4 are not supported: write FLAC"):
        _decoded(b"\0\0\0\x20ftypM4A " + bytes(100))
