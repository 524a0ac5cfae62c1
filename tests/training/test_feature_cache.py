"""The feature cache of evaluations: runs that share it, and files that a crash broke."""

import shutil

import numpy as np
import pytest

from cwcl_jax.config import from_config_dict, to_plain
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.feature_cache import FeatureCache, cache_folder
from tests.training.toy import toy_config

TOKENS = np.random.default_rng(0).integers(4, 50, (3, 16)).astype(np.int32)
INPUTS = {"tokens": TOKENS, "mask": np.ones((3, 16), bool)}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    config = toy_config(
        **{
            "data.keep_locked_features": True,
            "data.cache_dir": str(tmp_path_factory.mktemp("cache")),
            "towers.image.tune": "all",
            "towers.text.tune": "none",
            "towers.text.head": "none",
            "loss.weights_from": "text",
        }
    )
    return imported_encoder(config)


@pytest.fixture
def make(imported):
    encoder, sources = imported
    shutil.rmtree(cache_folder(encoder.blueprint.config), ignore_errors=True)
    return lambda: FeatureCache(encoder, sources)


def test_two_runs_may_save_at_the_same_time_and_both_stay(make):
    first, second = make(), make()
    other = {"tokens": TOKENS + 1, "mask": INPUTS["mask"]}
    expected = [first.encode("text", INPUTS), second.encode("text", other)]
    for cache in (first, second, first):
        cache.save()
    again = make()
    assert len(again._rows["text"]) == 6
    again.encoder = None  # is not asked for features
    for inputs, embeds in zip((INPUTS, other), expected, strict=True):
        features = again.encode("text", inputs, output="features")
        np.testing.assert_array_equal(features, make().encode("text", inputs, output="features"))
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        np.testing.assert_allclose(features / norms, embeds, atol=1e-6)  # there is no head


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x"])
def test_a_broken_file_is_made_again(make, damage, caplog):
    kept = make()
    expected = kept.encode("text", INPUTS)
    kept.save()
    (file,) = cache_folder(kept.encoder.blueprint.config).rglob("*.array_record")
    file.write_bytes(damage(file.read_bytes()))
    again = make()
    assert again._rows["text"] == {}
    assert "made again" in caplog.text
    np.testing.assert_array_equal(again.encode("text", INPUTS), expected)
    again.save()
    assert make()._rows["text"].keys() == kept._rows["text"].keys()
    file.unlink()  # of a process that was killed
    assert make()._rows["text"].keys() == kept._rows["text"].keys()


def test_features_of_another_encoder_preprocessing_or_dtype_are_not_found(make):
    kept = make()
    kept.encode("text", INPUTS)
    kept.save()
    assert make()._rows["text"]
    config = kept.encoder.blueprint.config
    for changes in ({"seed": 1}, {"data.text.lower_case": True}, {"data.kept_dtype": "float16"}):
        plain = to_plain(config)
        for path, value in changes.items():
            *parents, name = path.split(".")
            place = plain
            for parent in parents:
                place = place[parent]
            place[name] = value
        encoder, sources = imported_encoder(from_config_dict(plain))
        other = FeatureCache(encoder, sources)
        assert other._rows["text"] == {}
    # What is rounded is rounded at once, so that a second evaluation sees the same.
    first = other.encode("text", INPUTS)
    features = other.encode("text", INPUTS, output="features")
    np.testing.assert_array_equal(features, features.astype(np.float16))
    other.save()
    np.testing.assert_array_equal(FeatureCache(encoder, sources).encode("text", INPUTS), first)
