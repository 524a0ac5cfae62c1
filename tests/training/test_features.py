"""Features are kept, or read, only where the inputs are the same in every epoch."""

import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.sources import Embedded, Source, open_source
from cwcl_jax.training.features import _check_repeatable, cache_folder, training_source
from tests.data.making import jpeg, write_tar
from tests.training.toy import toy_config

SOURCE = "scenes:train?n=20"
TEXT_LOCKED = {
    "towers.image.tune": "all",
    "towers.text.tune": "none",
    "towers.text.head": "none",
    "loss.weights_from": "text",
}


def _embedded(folder, line: str, modality: str) -> str:
    """The source line with a folder of vectors beside it."""
    source = open_source(line)
    description = EmbeddingDescription(
        modality, (4,), "float32", len(source), source.fingerprint(), "weights"
    )
    ids = [source.read(index, ())["id"] for index in range(len(source))]
    EmbeddingWriter(folder, description).write(range(len(source)), ids, np.ones((len(ids), 4)))
    return f"{line}{'&' if '?' in line else '?'}features_from={folder}"


def _captions(path, *captions: str) -> str:
    members = [[(f"{n}.jpg", jpeg(n)), (f"{n}.txt", c.encode())] for n, c in enumerate(captions)]
    write_tar(path / "0.tar", [member for pair in members for member in pair])
    return f"tars:{path}/0.tar?text=lines"


@pytest.mark.parametrize("changes", [{"data.image.flip": True}, {"data.image.crop_min_area": 0.5}])
def test_pictures_that_vary_are_refused_on_both_ways(tmp_path, changes):
    kept = toy_config(**changes, **{"data.train": SOURCE, "data.keep_locked_features": True})
    with pytest.raises(ConfigError, match=r"keep_locked_features=True needs inputs.*flip="):
        training_source(kept)
    line = _embedded(tmp_path, SOURCE, "image")
    with pytest.raises(ConfigError, match=r"^features_from= needs inputs.*crop_min_area="):
        training_source(toy_config(**changes, **{"data.train": line}))


def test_pictures_that_are_the_same_are_read(tmp_path):
    line = _embedded(tmp_path, SOURCE, "image")
    assert isinstance(training_source(toy_config(**{"data.train": line})), Embedded)


def test_a_tower_without_an_encoder_takes_whatever_it_is_given(tmp_path):
    line = _embedded(tmp_path, SOURCE, "image")
    changes = {"towers.image.encoder": "precomputed", "towers.image.overrides": {"width": 4}}
    config = toy_config(**changes, **{"data.train": line, "data.image.size": 64})
    assert training_source(config).embedded == ("image",)
    with pytest.raises(ConfigError, match=r"config\.data\.image has no field 'flip'"):
        toy_config(**changes, **{"data.image.flip": True})


def test_several_captions_are_refused_on_both_ways(tmp_path):
    line = _captions(tmp_path, "one", "two\n", "a red circle\nsomething round")
    kept = toy_config(**TEXT_LOCKED, **{"data.train": line, "data.keep_locked_features": True})
    with pytest.raises(ConfigError, match=r"0\.tar/2 has 2 captions"):
        training_source(kept)
    read = toy_config(**TEXT_LOCKED, **{"data.train": _embedded(tmp_path / "e", line, "text")})
    with pytest.raises(ConfigError, match=r"^features_from= .*0\.tar/2 has 2 captions"):
        training_source(read)


def test_one_caption_an_example_is_kept(tmp_path):
    line = _captions(tmp_path, "one", "two\n\n", "three", "")
    changes = {"data.train": line, "data.keep_locked_features": True, "data.cache_dir": "~/kept"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        config = toy_config(**TEXT_LOCKED, **changes, global_batch_size=4)
        assert training_source(config).embedded == ("text",)
        assert cache_folder(config) == tmp_path / "kept" / "features"
        assert cache_folder(config).is_dir()


class Recordings(Source):
    def __init__(self, *seconds: float):
        self.seconds = seconds

    @property
    def durations(self):
        return np.array(self.seconds) if self.seconds else None

    def __len__(self) -> int:
        return 3

    def fingerprint(self) -> str:
        return "recordings"


@pytest.mark.parametrize(
    ("source", "random_crop", "refused"),
    [
        (Recordings(), True, True),
        (Recordings(), False, False),
        (Recordings(1.0, 11.0, 2.0), True, True),
        (Recordings(1.0, 9.0, 2.0), True, False),
    ],
)
def test_random_windows_of_speech_are_refused_where_there_are_any(source, random_crop, refused):
    config = toy_config(**{"data.speech.random_crop": random_crop})
    if not refused:
        _check_repeatable(config, ["speech"], source, "features_from=")
        return
    with pytest.raises(ConfigError, match="random_crop=True changes the windows"):
        _check_repeatable(config, ["speech"], source, "features_from=")
