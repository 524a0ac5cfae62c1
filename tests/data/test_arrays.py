"""Features of users: what tells two files apart, labels, and files that cannot be used."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from cwcl_jax.data.sources import open_source

COUNT = 12
FEATURES = np.random.default_rng(0).normal(size=(COUNT, 3, 4)).astype(np.float32)


def _open(tmp_path, **arrays):
    np.savez(tmp_path / "f.npz", **arrays)
    return open_source(f"arrays:{tmp_path}/f.npz")


def test_features_that_are_computed_anew_are_other_data(tmp_path):
    arrays = {"u": FEATURES, "ids": np.arange(COUNT), "label": np.arange(COUNT) % 3}
    before = _open(tmp_path, **arrays).fingerprint()
    size = (tmp_path / "f.npz").stat().st_size
    for name, array in arrays.items():
        changed = array.copy()
        changed.flat[-1] += 1
        other = _open(tmp_path, **{**arrays, name: changed})
        assert (tmp_path / "f.npz").stat().st_size == size
        assert other.fingerprint() != before, name
    # The bytes decide, not the file's name, time or order.
    np.savez(tmp_path / "again.npz", **dict(reversed(arrays.items())))
    assert open_source(f"arrays:{tmp_path}/again.npz").fingerprint() == before
    turned = np.asfortranarray(FEATURES)
    assert _open(tmp_path, **{**arrays, "u": turned}).fingerprint() == before


def test_labels_are_numbers_or_names(tmp_path):
    numbers = _open(tmp_path, u=FEATURES, label=np.arange(COUNT) % 4)
    assert (numbers.class_names, numbers[6]["label"]) == (None, 2)
    assert set(numbers.lacks) == {"image", "audio", "text"}
    names = _open(tmp_path, u=FEATURES, labels=np.array(["b", "a", "c"] * 4))
    assert names.class_names == ["a", "b", "c"]
    assert [names[i]["label"] for i in range(3)] == [1, 0, 2]
    none = _open(tmp_path, u=FEATURES, text=np.array(["\ufeffa cat"] * COUNT))
    assert set(none.lacks) == {"image", "audio", "label"}
    assert none[0]["text"] == "a cat"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("dim", np.array(8), r"'dim' of f.npz \(shape \(\), int64\) has no axis of examples"),
        ("label", np.ones(COUNT, np.float32), "one integer, or one class name"),
        ("label", np.ones((COUNT, 2), np.int32), "one integer, or one class name"),
        ("names", np.array(["a"] * COUNT), "'names' .* holds no numbers"),
        ("ids", np.array(["a"] * COUNT, object), r"f.npz cannot be read: Object arrays .*astype"),
    ],
)
def test_arrays_that_are_no_rows_are_named(tmp_path, name, array, message):
    with pytest.raises(ValueError, match=message):
        _open(tmp_path, u=FEATURES, **{name: array})


@pytest.mark.parametrize("kept", [0, 500, 1500])
def test_broken_files_are_named(tmp_path, kept):
    np.savez(tmp_path / "f.npz", u=FEATURES, v=FEATURES)
    save_file({"u": FEATURES}, tmp_path / "f.safetensors")
    for kind in ("npz", "safetensors"):
        file = tmp_path / f"f.{kind}"
        file.write_bytes(file.read_bytes()[: min(kept, file.stat().st_size - 1)])
        with pytest.raises(ValueError, match=f"f.{kind} cannot be read"):
            open_source(f"arrays:{file}")
