"""What of the training data its towers never see: counted before the first step, and a limit."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from cwcl_jax.config import ConfigError
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.survey import survey
from cwcl_jax.modalities import SpeechInputs, TextInputs
from cwcl_jax.modalities.tokenizer import OUTSIDE_SCENES
from cwcl_jax.training.features import training_source
from tests.training.toy import toy_config


@pytest.fixture
def captions(tmp_path):
    """A table with a picture for each caption."""

    def write(*texts):
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        rows = "".join(f"a.png\t{text}\n" for text in texts)
        (tmp_path / "t.tsv").write_text(f"filepath\ttitle\n{rows}")
        return f"tsv:{tmp_path}/t.tsv"

    return write


def test_own_captions_under_the_tokenizer_of_scenes_are_refused(captions):
    line = captions("Der Hund schläft", "a zebra grazes", "a red circle")
    losses = survey(open_source(line), {"text": TextInputs()})
    assert [(x.remark, x.count, x.of) for x in losses] == [(OUTSIDE_SCENES, 2, 3)]
    with pytest.raises(ConfigError, match=r"2 of 3 text inputs.*config\.data\.text\.tokenizer"):
        training_source(toy_config(**{"data.train": line}))
    training_source(toy_config(**{"data.train": line, "data.max_cut_share": 1.0}))


def test_captions_that_are_cut_are_told_and_refused_where_they_are_most(captions, capsys):
    long = "a red circle on the left and a blue square on the right of it"
    line = captions(long, "a star", "a ring")
    training_source(toy_config(**{"data.train": line}))
    assert "1 of 3 text inputs are cut at max_tokens=16" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"2 of 3 text.*max_cut_share=0\.5.*config\.data\.text"):
        training_source(toy_config(**{"data.train": captions(long, long, "a star")}))


def test_a_caption_that_just_fits_is_not_cut():
    inputs = TextInputs(max_tokens=5)
    assert inputs.lost("a red circle") == ()
    assert inputs.lost("a red circle here") == ("cut at max_tokens=5",)


def test_recordings_that_are_cut_are_told():
    inputs = SpeechInputs(max_seconds=0.5)
    assert inputs.lost((np.zeros(8_000, np.int16), 16_000)) == ()
    assert inputs.lost((np.zeros(24_000, np.int16), 16_000)) == (
        "longer than max_seconds=0.5, and cut there",
    )


def test_a_recording_that_is_longer_than_its_list_says_is_no_part_of_the_batch():
    """Seconds of a list in another unit: four seconds of sound in a batch of one second."""
    inputs = SpeechInputs(max_seconds=8.0, buckets=(1.0, 2.0))
    four = (np.ones(64_000, np.int16), 16_000)
    with pytest.raises(BadExample, match=r"longer than listed: 4\.00 s in a batch of up to 1 s"):
        inputs.fitting(four, 1.0)
    assert inputs.fitting(four, 8.0).max_seconds == 8.0
    assert inputs.fitting((np.ones(16_100, np.int16), 16_000), 1.0).max_seconds == 1.0


def test_silent_recordings_are_told_before_the_first_step(tmp_path):
    for name, level in (("a", 0), ("b", 9000), ("c", 9000)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(8_000, level, np.int16), 16_000)
    rows = "".join(f"{name}.wav,hello\n" for name in "abc")
    (tmp_path / "t.csv").write_text("audio,text\n" + rows)
    losses = survey(open_source(f"csv:{tmp_path}/t.csv"), {"speech": SpeechInputs()})
    assert [str(loss) for loss in losses] == ["1 of 3 speech inputs are silent"]


def test_data_whose_files_are_not_there_is_refused_before_the_run(tmp_path):
    """Few of them are left to the count of the run, which is exact."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    def table(missing):
        names = ["a.png"] * (100 - missing) + ["gone.png"] * missing
        rows = "".join(f"{name}\ta red circle\n" for name in names)
        (tmp_path / f"{missing}.tsv").write_text(f"filepath\ttitle\n{rows}")
        return toy_config(**{"data.train": f"tsv:{tmp_path}/{missing}.tsv"})

    with pytest.raises(ConfigError, match=r"40 of 100 image inputs are unusable \(.*: 40\)"):
        training_source(table(40))
    training_source(table(10))
