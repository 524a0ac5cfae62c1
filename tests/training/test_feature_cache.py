"""The feature cache of evaluations: runs that share it, and files that a crash broke."""

import copy
import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from cwcl_jax.data.embeddings import EmbeddingStore, EmbeddingWriter
from cwcl_jax.data.sources import open_source
from cwcl_jax.training import feature_cache
from cwcl_jax.training.embedding import folder_description
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.feature_cache import FeatureCache, cache_folder
from tests.training.toy import toy_config

TOKENS = np.random.default_rng(0).integers(4, 50, (3, 16)).astype(np.int32)
INPUTS = {"tokens": TOKENS, "mask": np.ones((3, 16), bool)}


SETTINGS = {
    "data.keep_locked_features": True, "towers.image.tune": "all", "towers.text.tune": "none",
    "towers.text.head": "none", "loss.weights_from": "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    cache = {"data.cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return imported_encoder(toy_config(**SETTINGS, **cache))


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
    assert "computed again" in caplog.text
    np.testing.assert_array_equal(again.encode("text", INPUTS), expected)
    again.save()
    assert make()._rows["text"].keys() == kept._rows["text"].keys()
    file.unlink()  # of a process that was killed
    assert make()._rows["text"].keys() == kept._rows["text"].keys()


def test_features_of_another_encoder_preprocessing_or_dtype_are_not_found(make, imported):
    kept = make()
    kept.encode("text", INPUTS)
    kept.save()
    assert make()._rows["text"]
    encoder, folder = copy.copy(kept.encoder), kept.encoder.blueprint.config.data.cache_dir
    blueprint, (_, sources) = encoder.blueprint, imported
    for changes in ({"seed": 1}, {"data.text.lower_case": True}, {"data.kept_dtype": "float16"}):
        config = toy_config(**SETTINGS, **changes, **{"data.cache_dir": folder})
        encoder.blueprint = dataclasses.replace(blueprint, config=config)
        other = FeatureCache(encoder, sources)
        assert other._rows["text"] == {}
    # What is rounded is rounded at once, so that a second evaluation sees the same.
    first = other.encode("text", INPUTS)
    features = other.encode("text", INPUTS, output="features")
    np.testing.assert_array_equal(features, features.astype(np.float16))
    other.save()
    np.testing.assert_array_equal(FeatureCache(encoder, sources).encode("text", INPUTS), first)


@pytest.mark.parametrize("shared", [True, False])
def test_each_process_writes_a_share_and_the_rest_where_it_is_alone(
    imported, tmp_path, monkeypatch, capsys, shared
):
    encoder, sources = imported
    config = toy_config(**SETTINGS, **{"data.cache_dir": str(tmp_path)})
    source = open_source("scenes:train?n=18")
    usual = folder_description(encoder, sources, source, "text", output="features", dtype="float32")
    description = dataclasses.replace(usual, shard_size=4)
    files = []

    def meet(name, value, beat):
        (folder,) = (tmp_path / "features").glob("text-*/")
        files.append(sorted(int(file.name[8:13]) for file in folder.glob("vectors-*")))
        if shared:
            place = {"process_index": 0, "process_count": 2}
            others = EmbeddingWriter(folder, description, **place)
            feature_cache._write(others, config, encoder, source, beat)

    process = SimpleNamespace(process_index=lambda: 1, process_count=lambda: 2)
    monkeypatch.setattr(feature_cache, "jax", process)
    monkeypatch.setattr(feature_cache, "meet", meet)
    folder = feature_cache.keep(config, encoder, source, description, lambda: None)
    assert files == [[1, 3]]
    assert len(EmbeddingStore(folder)) == 18
    told = capsys.readouterr().out
    assert [told.count(f"each of {count} examples") for count in (8, 10)] == [1, 1]
