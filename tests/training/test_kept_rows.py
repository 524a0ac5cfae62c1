"""Kept features of evaluations: runs that share the cache, and files that a crash broke."""

import numpy as np
import pytest

from cwcl_jax.training import kept_rows
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.kept_rows import KeptRows
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
    for file in KeptRows(encoder, sources)._files.values():
        file.unlink(missing_ok=True)
    return lambda: KeptRows(encoder, sources)


def test_two_runs_may_save_at_the_same_time(make, monkeypatch):
    first, second = make(), make()
    first.encode("text", INPUTS)
    second.encode("text", {"tokens": TOKENS + 1, "mask": INPUTS["mask"]})
    savez = np.savez

    def interrupted(*args, **arrays):
        savez(*args, **arrays)
        monkeypatch.undo()
        second.save()

    monkeypatch.setattr(kept_rows.np, "savez", interrupted)
    first.save()
    assert make()._rows["text"].keys() == first._rows["text"].keys()
    (file,) = first._files.values()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x"])
def test_a_broken_file_is_made_again(make, damage, caplog):
    kept = make()
    expected = kept.encode("text", INPUTS)
    kept.save()
    (file,) = kept._files.values()
    file.write_bytes(damage(file.read_bytes()))
    again = make()
    assert again._rows["text"] == {}
    assert "made again" in caplog.text
    np.testing.assert_array_equal(again.encode("text", INPUTS), expected)
    again.save()
    assert make()._rows["text"].keys() == kept._rows["text"].keys()
