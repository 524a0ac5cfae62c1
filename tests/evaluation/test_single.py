"""One recording or picture against typed class names."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from cwcl_jax.evaluation.single import rank_classes
from tests.evaluation.analytic import DATA, RATE, Analytic

WORDS = {"circle": np.array([1.0, 0]), "square": np.array([0, 1.0])}
TABLE = np.tile([0.6, 0.8], (40_000, 1))


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def rank(path, names=("circle", "square"), modality="speech", **options):
    return rank_classes(path, modality, names, encode=Analytic(TABLE, WORDS), data=DATA, **options)


def test_classes_are_ranked_with_their_cosines(tmp_path):
    ranked = rank(write(tmp_path / "a.wav", np.full(800, 1000, np.int16)), ("circle", " square"))
    assert ranked.names == ("square", "circle")
    np.testing.assert_allclose(ranked.similarities, (0.8, 0.6), rtol=1e-6)
    assert ranked.warnings == ()
    lines = ranked.table("a.wav").text().splitlines()
    assert lines[4].split() == ["1", "0.8000", "square"]


def test_classes_are_worded_as_in_tasks(tmp_path):
    """An identifier as words in its prompt, and as it was given in the table."""
    file = write(tmp_path / "a.wav", np.full(800, 1000, np.int16))
    model, seen = Analytic(TABLE, WORDS), []

    def encode(modality, inputs):
        if modality == "text":
            seen.append(inputs["tokens"])
        return model(modality, inputs)

    for names in (("big_circle", "square"), ("big circle", "square")):
        ranked = rank_classes(file, "speech", names, encode=encode, data=DATA)
        assert set(ranked.names) == set(names)
    np.testing.assert_array_equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("name", "rate", "channels"), [("a.flac", 44_100, 2), ("a.wav", 8000, 1), ("a.mp3", 48_000, 1)]
)
def test_any_rate_stereo_and_format(tmp_path, name, rate, channels):
    tone = 0.1 * np.sin(np.arange(rate // 20) / 10)
    samples = np.repeat(tone[:, None], channels, axis=1)
    assert rank(write(tmp_path / name, samples, rate)).names[0] == "square"


def test_pictures_are_ranked_too(tmp_path):
    Image.new("RGB", (40, 30), (7, 7, 7)).save(tmp_path / "a.png")
    assert rank(tmp_path / "a.png", modality="image").names == ("square", "circle")


def test_recordings_that_mean_little_are_warned_of(tmp_path):
    ranked = rank(write(tmp_path / "a.wav", np.zeros(800, np.int16)))
    assert "silent" in ranked.warnings[0]
    square = np.where(np.arange(800) % 40 < 20, 32_767, -32_768).astype(np.int16)
    clipped = rank(write(tmp_path / "d.wav", square))
    assert "clipped: more than 1% of the samples" in clipped.warnings[0]
    long = rank(write(tmp_path / "b.wav", np.full(RATE, 1000, np.int16)))
    assert "longer than max_seconds=0.1, and cut there" in long.warnings[0]
    short = rank(write(tmp_path / "e.wav", np.full(100, 1000, np.int16)))
    assert "shorter than one frame (400 samples)" in short.warnings[0]
    twice = rank(write(tmp_path / "c.wav", np.full(800, 1000, np.int16)), ("circle", "circle", ""))
    assert twice.names == ("circle",)
    assert "repeated" in twice.warnings[0]


def test_bad_recordings_are_clear_errors(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(ValueError, match=r"broken\.wav cannot be used: audio unreadable"):
        rank(tmp_path / "broken.wav")
    with pytest.raises(ValueError, match="audio empty"):
        rank(write(tmp_path / "none.wav", np.zeros(0, np.int16)))
    with pytest.raises(FileNotFoundError, match="no such file"):
        rank(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="no class names"):
        rank(write(tmp_path / "a.wav", np.full(800, 1000, np.int16)), ("", " "))
