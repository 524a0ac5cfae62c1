"""Settings that cannot work are refused where they are made, and the cache has one place."""

from pathlib import Path

import pytest

from cwcl_jax.config import ConfigError, defaults, from_config_dict
from cwcl_jax.copies import cache_home
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.recorded import default_folder
from cwcl_jax.data.sources.tar_index import load_index
from cwcl_jax.modalities import ImageInputs, SpeechInputs, TextInputs
from tests.data.making import pairs, write_tar


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ImageInputs, {"size": 0}, "size=0 must be at least 1"),
        (ImageInputs, {"crop_min_area": 50.0}, "crop_min_area=50.0 must be between 0 and 1"),
        (ImageInputs, {"crop_min_area": -0.1}, "crop_min_area"),
        (ImageInputs, {"crop_min_area": float("nan")}, "crop_min_area"),
        (ImageInputs, {"max_pixels": 0}, "max_pixels"),
        (ImageInputs, {"size": 64, "eval_resize": 32}, "eval_resize=32 is smaller than size=64"),
        (ImageInputs, {"eval_resize": -1}, "eval_resize"),
        (TextInputs, {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        (SpeechInputs, {"sample_rate": 0}, "sample_rate"),
        (SpeechInputs, {"sample_rate": 8_000}, "sample_rate=8000 must be 16000"),
        (SpeechInputs, {"max_seconds": 0.0}, "max_seconds=0.0 must be a positive number"),
        (SpeechInputs, {"max_seconds": float("inf")}, "max_seconds"),
        (SpeechInputs, {"buckets": (-1.0,)}, "buckets"),
        (DataConfig, {"examples_per_epoch": -20}, "examples_per_epoch=-20 must be at least 0"),
        (DataConfig, {"max_skipped_share": -1.0}, "max_skipped_share=-1.0 must be between 0 and 1"),
        (DataConfig, {"max_skipped_share": 5.0}, "max_skipped_share"),
        (DataConfig, {"prefetch": -4}, "prefetch"),
        (DataConfig, {"threads": -1}, "threads"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_wrong_setting_of_an_experiment_is_named_with_its_path():
    made = defaults()
    made.data.image.size = 0
    with pytest.raises(ConfigError, match=r"config\.data\.image: size=0"):
        from_config_dict(made)


def test_the_cache_has_one_place_and_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() == tmp_path / ".cache" / "cwcl_jax"
    assert cache_home("~/mine") == tmp_path / "mine"
    assert cache_home("/data/cache") == Path("/data/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert cache_home() == tmp_path / "other" / "cwcl_jax"


def test_all_that_is_kept_lies_in_the_named_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = default_folder(open_source("commands:train?n=3"), "~/mine")
    assert folder.parent == tmp_path / "mine" / "recordings"
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "0.tar", pairs(2))
    load_index(str(tmp_path / "0.tar"), "~/mine")
    assert len(list((tmp_path / "mine").glob("*.offsets"))) == 1
    assert not (tmp_path / "~").exists()
