import numpy as np
import pytest

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.synthetic.espeak import VARIANTS, VOICES, random_voice

pytest.importorskip("espeakng_loader")


@pytest.fixture
def sentences(tmp_path):
    lines = ["sentence\tintent", "turn on the light\ton", "\ton", "what time is it now\ttime"]
    (tmp_path / "s.tsv").write_text("\n".join(lines) + "\n")
    return f"spoken:tsv:{tmp_path}/s.tsv?text=sentence&label=intent"


def test_sentences_are_read_aloud(sentences):
    source = open_source(sentences)
    assert len(source) == 3
    assert source.class_names == ["on", "time"]
    example = source[0]
    samples, rate = example["audio"]
    assert samples.dtype == np.int16
    assert 0.5 < len(samples) / rate < 4
    assert np.abs(samples.astype(int)).max() > 2000
    assert (example["text"], example["label"]) == ("turn on the light", 0)


def test_only_sentences_with_words_are_spoken(sentences):
    source = open_source(sentences + "&voices=en-us")
    assert "audio" not in source.read(0, ("text",))
    with pytest.raises(BadExample, match="text empty"):
        source[1]


def test_the_first_text_that_is_one_is_spoken(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": ["", " ", "play music"]}\n{"text": []}\n')
    source = open_source(f"spoken:jsonl:{tmp_path}/s.jsonl?voices=en-us")
    assert len(source.read(0, ("audio",))["audio"][0]) > 5000
    with pytest.raises(BadExample, match="text empty"):
        source.read(1, ("audio",))
    assert set(source.lacks) == {"image", "label"}
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg"}\n')
    silent = open_source(f"spoken:jsonl:{tmp_path}/t.jsonl")
    assert set(silent.lacks) == {"text", "audio", "label"}


def test_voices_follow_the_index_and_the_seed(sentences):
    voices = [random_voice(Draws(0, 31, index)) for index in range(200)]
    assert {voice.name.split("+")[0] for voice in voices} == set(VOICES)
    assert len({voice.name for voice in voices}) > 60
    assert voices == [random_voice(Draws(0, 31, index)) for index in range(200)]
    named = {random_voice(Draws(0, 31, i), ("en+f2",)).name for i in range(20)}
    assert named == {"en+f2"}
    prints = {open_source(sentences + extra).fingerprint() for extra in ("", "&voice_seed=1")}
    assert len(prints) == 2


def test_every_voice_exists():
    from cwcl_jax.synthetic.espeak import Voice, speak

    for name in VOICES:
        assert len(speak("yes", Voice(name))[0]) > 1000
    for variant in filter(None, VARIANTS):
        assert len(speak("yes", Voice(f"en+{variant}"))[0]) > 1000
    with pytest.raises(ValueError, match="no voice"):
        speak("yes", Voice("martian"))


def test_scenes_can_be_spoken():
    source = open_source("spoken:scenes:train?n=4&voices=en-us")
    assert len(source) == 4
    assert len(source[0]["audio"][0]) > 5000
