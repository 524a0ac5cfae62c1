"""Features are kept, or read, only where the inputs that training draws can be listed."""

import numpy as np
import pytest

from cwcl_jax.config import ConfigError, defaults, from_config_dict
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.sources import Embedded, Source, open_source
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.feature_cache import cache_folder
from cwcl_jax.training.features import _check_repeatable, training_source
from cwcl_jax.training.run import train
from cwcl_jax.training.validation import split_source
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
def test_pictures_that_vary_without_end_are_refused_on_both_ways(tmp_path, changes):
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


def test_vectors_of_first_captions_are_refused_where_training_draws_others(tmp_path):
    line = _captions(tmp_path, "one", "two\n", "a red circle\nsomething round")
    read = toy_config(**TEXT_LOCKED, **{"data.train": _embedded(tmp_path / "e", line, "text")})
    with pytest.raises(ConfigError, match=r"holds a vector of 4 .*captions \(.*0\.tar/2 has 2\)"):
        training_source(read)


def test_vectors_of_other_views_are_refused(tmp_path):
    line = _embedded(tmp_path, SOURCE, "image")
    views = toy_config(**{"data.train": line, "data.image.flip": True, "data.image.views": 3})
    with pytest.raises(ConfigError, match="training draws from 3 views"):
        training_source(views)


@pytest.mark.parametrize(("kind", "dtype"), [("captions", "float32"), ("views", "bfloat16")])
def test_kept_features_are_those_of_the_inputs_that_training_draws(tmp_path, kind, dtype):
    """Ten batches, three epochs: the features and labels that the tower would have had."""
    captions = [f"{n}\n" + "\n".join(f"a {w} {n}" for w in "xyz"[: n % 4]) for n in range(24)]
    tower, changes = "text", {**TEXT_LOCKED, "data.labels": "text", "loss.duplicates": "masked"}
    if kind == "views":
        tower = "image"
        changes = {"data.image.flip": True, "data.image.crop_min_area": 0.5, "data.image.views": 3}
    changes |= {"data.train": _captions(tmp_path, *captions), "global_batch_size": 8}
    config = toy_config(**changes)
    kept = toy_config(
        **changes, **{"data.keep_locked_features": True, "data.kept_dtype": dtype},
        **{"data.cache_dir": str(tmp_path / "cache")},
    )  # fmt: skip
    encoder, _ = imported_encoder(config)
    batches = [
        train_batches(
            made.data, made.tower_names, seed=0, global_batch_size=8, source=training_source(made)
        )
        for made in (config, kept)
    ]
    inputs = set()
    for _ in range(10):
        plain, cached = map(next, batches)
        expected = encoder.encode(tower, plain[tower], output="features")
        tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
        found = cached[tower]["features"]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        for name in {"index", "label"} & set(plain):
            np.testing.assert_array_equal(plain[name], cached[name])
        other = "image" if tower == "text" else "text"
        for name, array in plain[other].items():
            np.testing.assert_array_equal(array, cached[other][name])
        inputs |= {row.tobytes() for row in next(iter(plain[tower].values()))}
    assert len(inputs) > 30  # of 24 examples: others were drawn
    for made in batches:
        made.close()


def test_a_mixture_keeps_its_shares_with_kept_features(tmp_path):
    line = "scenes:train?n=12&weight=1::scenes:train?n=12&captions=2&weight=3"
    changes = {"data.train": line, "data.validation_share": 0.25, "global_batch_size": 4}
    kept = {"data.keep_locked_features": True, "data.cache_dir": str(tmp_path)}
    orders = []
    for config in (toy_config(**changes), toy_config(**changes, **kept)):
        source, held = split_source(config, training_source(config))
        assert [len(part) for part in source.parts] == [9, 9]
        assert ("image" in source.embedded) == config.data.keep_locked_features
        made = [
            train_batches(config.data, config.tower_names, seed=0, global_batch_size=4, source=part)
            for part in (source, held)
        ]
        orders.append([next(batches)["index"] for batches in made for _ in range(8)])
        for batches in made:
            batches.close()
    np.testing.assert_array_equal(*orders)


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


def _of_features(tmp_path, line: str, width: int):
    """Two towers of features a and b, both 4 wide in the file; b is said to be `width` wide."""
    rows = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    np.savez(tmp_path / "f.npz", a=rows, b=rows[::-1], id=np.arange(64))
    config = defaults(name="features", total_steps=2, global_batch_size=16, embed_dim=4)
    config.data.train = f"arrays:{tmp_path}/f.npz?features=a,b{line}"
    for name, size, head, tune in (("a", 4, "none", "none"), ("b", width, "linear", "head")):
        config.towers[name] = defaults(
            TowerConfig, encoder="precomputed", overrides={"width": size}, head=head, tune=tune
        )
    config.loss.weights_from = "a"
    return config


def test_features_of_another_width_than_the_tower_s_end_before_the_first_step(tmp_path):
    config = from_config_dict(_of_features(tmp_path, "", 5))
    said = r"features 'b' of shape \(4,\) in each example, the b tower reads \(5,\)"
    with pytest.raises(ConfigError, match=said):
        train(config, tmp_path / "run")


def test_rows_in_another_order_than_the_source_s_are_a_setting_to_correct(tmp_path):
    rows = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
    np.savez(tmp_path / "g.npz", g=rows, ids=np.arange(64)[::-1])
    config = _of_features(tmp_path, f"&features_from=g:{tmp_path}/g.npz", 4)
    config.loss.name, config.data.guide = "cellclip", "g"
    with pytest.raises(ConfigError, match=r"Row \d+ of .*g\.npz belongs to .*the source's order"):
        train(from_config_dict(config), tmp_path / "run")
