"""Arrays of users: raw inputs and features, what tells two files apart, files that are no use."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import array_files, open_source
from cwcl_jax.data.sources.base import require_fields

COUNT = 12
FEATURES = np.random.default_rng(0).normal(size=(COUNT, 3, 4)).astype(np.float32)


def _open(tmp_path, **arrays):
    np.savez(tmp_path / "f.npz", **arrays)
    return open_source(f"arrays:{tmp_path}/f.npz")


def test_a_raw_field_may_have_the_name_of_an_array_that_is_not_its_own(tmp_path):
    np.savez(tmp_path / "a.npz", eeg=np.zeros((2, 3)), filtered=np.ones((2, 3)), text=["a", "b"])
    source = open_source(f"arrays:{tmp_path}/a.npz?raw=eeg:filtered")
    require_fields(source, ("eeg", "text"), "a.npz")
    np.testing.assert_array_equal(source.read(0, ("eeg",))["eeg"], np.ones(3))


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
        ("label", np.ones(COUNT, np.float32), "one integer or one class name"),
        ("label", np.ones((COUNT, 2), np.int32), "one integer or one class name"),
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


EEG = np.random.default_rng(1).integers(-99, 99, size=(COUNT, 3, 7)).astype(np.int16)
IDS = 2**62 + np.arange(COUNT)


def _write_npz(folder, arrays):
    np.savez(folder / "f.npz", **arrays)
    return folder / "f.npz"


def _write_compressed(folder, arrays):
    np.savez_compressed(folder / "f.npz", **arrays)
    return folder / "f.npz"


def _write_npy_folder(folder, arrays):
    (folder / "npy").mkdir()
    for name, array in arrays.items():
        np.save(folder / "npy" / f"{name}.npy", array)
    return folder / "npy"


def _write_safetensors(folder, arrays):
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "U"}
    save_file(numbers, folder / "f.safetensors")
    return folder / "f.safetensors"


def _write_hdf5(folder, arrays):
    import h5py

    with h5py.File(folder / "f.h5", "w") as file:
        for name, array in arrays.items():
            if array.dtype.kind == "U":
                file.create_dataset(name, data=array.astype(object), dtype=h5py.string_dtype())
            else:
                # Chunks and compression do not show.
                file.create_dataset(name, data=array, compression="gzip")
    return folder / "f.h5"


def _write_zarr(folder, arrays):
    import zarr

    group = zarr.open_group(str(folder / "f.zarr"), mode="w")
    for name, array in arrays.items():
        if array.dtype.kind != "U":
            group.create_array(name, data=array)
    return folder / "f.zarr"


WRITERS = {
    "npz": _write_npz,
    "compressed": _write_compressed,
    "npy": _write_npy_folder,
    "safetensors": _write_safetensors,
    "hdf5": _write_hdf5,
    "zarr": _write_zarr,
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch, kind, in_memory):
    if not in_memory:
        monkeypatch.setattr(array_files, "_KEPT_BYTES", 100)
    arrays = {"eeg": EEG, "clip": FEATURES, "ids": IDS, "label": np.arange(COUNT) % 3}
    texts = {"caption": np.array([f"caption {n}" for n in range(COUNT)])}
    path = WRITERS[kind](tmp_path, arrays | texts)
    option = "&text=caption" if kind not in ("safetensors", "zarr") else ""
    source = open_source(f"arrays:{path}?raw=eeg&features=image:clip{option}")
    assert source.embedded == ("image",)
    for index in np.random.default_rng(2).permutation(COUNT).tolist():
        example = source[index]
        assert example["id"] == str(2**62 + index)
        assert example["label"] == index % 3
        assert example.get("text", f"caption {index}") == f"caption {index}"
        assert example["eeg"].dtype == np.int16
        np.testing.assert_array_equal(example["eeg"], EEG[index])
        np.testing.assert_array_equal(example["features"]["image"], FEATURES[index])
        example["eeg"][:] = 0  # the caller's own
    order = np.array([5, 1, 5])
    np.testing.assert_array_equal(source.vectors(order)["image"], FEATURES[order])
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda n: source.read(n, ("eeg",))["eeg"], range(COUNT)))
    np.testing.assert_array_equal(read, EEG)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.fingerprint(), len(pickle.dumps(source)) < 1000) == (source.fingerprint(), True)
    np.testing.assert_array_equal(copy[3]["eeg"], EEG[3])


def test_large_members_are_mapped_and_small_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "_KEPT_BYTES", 200)
    turned = np.asfortranarray(FEATURES)
    np.savez(tmp_path / "f.npz", eeg=EEG, turned=turned, label=np.arange(COUNT, dtype=np.int8))
    arrays = array_files.load_arrays(tmp_path / "f.npz")
    mapped = {name: isinstance(array, np.memmap) for name, array in arrays.items()}
    assert mapped == {"eeg": True, "turned": True, "label": False}
    np.testing.assert_array_equal(arrays["turned"], FEATURES)
    np.testing.assert_array_equal(arrays["eeg"], EEG)


def test_the_line_says_what_is_raw_and_what_is_features(tmp_path):
    np.savez(tmp_path / "f.npz", eeg=EEG, image=FEATURES, text=FEATURES[:, 0], scale=np.ones(3))
    line = f"arrays:{tmp_path}/f.npz"
    raw = open_source(f"{line}?raw=eeg")
    assert (raw.embedded, raw[0].keys()) == ((), {"id", "eeg"})
    with pytest.raises(ValueError, match="'image' that the line does not use; add raw=image or"):
        require_fields(raw, {"image"}, line)
    # Numbers called text are no captions.
    both = open_source(f"{line}?features=image,text")
    assert both.embedded == ("image", "text")
    assert "eeg" not in both[0]
    assert len({s.fingerprint() for s in (raw, both, open_source(f"{line}?features=image"))}) == 3
    swapped = open_source(f"{line}?features=image:text,text:image")
    assert swapped.fingerprint() != both.fingerprint()
    # Without a word about it, all arrays of the file are features.
    with pytest.raises(ValueError, match=r"differ in length: .*'scale': 3"):
        open_source(line)


def test_a_column_of_numbers_is_no_features(tmp_path):
    source = _open(tmp_path, u=FEATURES, fold=np.arange(COUNT))
    assert source.embedded == ("u",)
    assert len([source.read(i, ("features",)) for i in range(COUNT)]) == COUNT  # fold 0 as well
    with pytest.raises(ValueError, match="'fold' that the line does not use"):
        require_fields(source, {"fold"}, "f.npz")
    with pytest.raises(ValueError, match=r"'fold' of f\.npz has one number per example"):
        open_source(f"arrays:{tmp_path}/f.npz?features=u,fold")


def test_one_npy_is_called_as_the_line_says(tmp_path):
    np.save(tmp_path / "X_train.npy", EEG)
    source = open_source(f"arrays:{tmp_path}/X_train.npy?raw=eeg")
    np.testing.assert_array_equal(source[3]["eeg"], EEG[3])
    assert source[3]["id"] == "3"


def test_labels_have_the_names_that_the_file_gives(tmp_path):
    names = np.array(["rest", "left", "right"])
    labels = np.array([0, 2, 1, 3, -1, 0] * 2)
    source = _open(tmp_path, u=FEATURES, y=labels, class_names=names)
    assert source.class_names == ["rest", "left", "right"]
    # Without label= the array y would be features.
    np.savez(tmp_path / "f.npz", u=FEATURES, y=labels, class_names=names)
    source = open_source(f"arrays:{tmp_path}/f.npz?label=y")
    assert [source.read(n, ("label",))["label"] for n in (0, 1, 2)] == [0, 2, 1]
    for index in (3, 4):
        with pytest.raises(BadExample, match=r"label unreadable: .*not one of the 3 classes"):
            source.read(index, ("label",))
    words = _open(tmp_path, u=FEATURES, label=names[[2, 0, 1] * 4], class_names=names)
    assert [words[n]["label"] for n in range(3)] == [2, 0, 1]
    with pytest.raises(ValueError, match="label 'left' is not one of its class names"):
        _open(tmp_path, u=FEATURES, label=names[[1] * COUNT], class_names=names[:1])


def test_rows_that_cannot_be_used_are_bad_examples_by_id(tmp_path):
    features, waves = FEATURES.copy(), EEG.astype(np.float16)
    features[1], features[2, 0, 0], waves[3, 0, 0] = 0, np.inf, np.nan
    features[4] *= 1e30  # the square of its norm is infinite in float32
    features[5] *= 1e-30
    np.savez(tmp_path / "f.npz", u=features, eeg=waves, ids=IDS)
    source = open_source(f"arrays:{tmp_path}/f.npz?raw=eeg&features=u")
    for index, kind in (
        (1, "features all zero"),
        (2, "features not finite"),
        (3, "eeg not finite"),
        (4, "features too large or too small"),
        (5, "features too large or too small"),
    ):
        with pytest.raises(BadExample, match=f"{kind}: {IDS[index]}"):
            source.read(index, ("eeg", "features"))
    assert source.read(3, ("features",))["features"]["u"].dtype == np.float32
    assert source.vectors(np.array([0, 1])) is None
    assert source.vectors(np.array([0, 3])) is not None


def test_pictures_in_an_array_come_as_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(COUNT, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "f.npz", x=pixels, y=pixels[..., 0].astype(np.float32))
    picture = open_source(f"arrays:{tmp_path}/f.npz?raw=image:x")[4]["image"]
    assert isinstance(picture, Image.Image)
    np.testing.assert_array_equal(np.asarray(picture), pixels[4])
    with pytest.raises(BadExample, match=r"takes uint8 \(y, x, 3\) or \(y, x\), not float32"):
        open_source(f"arrays:{tmp_path}/f.npz?raw=image:y").read(0, ("image",))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("raw=egg", r"f.npz has no array 'egg' \(raw=egg:egg\); it has eeg, ids"),
        ("raw=label:eeg", "'label' cannot name a raw array"),
        ("raw=a:eeg&features=a:eeg", "named by raw= and by features="),
        ("raw=eeg&label=eeg", r"'eeg' .* must hold one integer or one class name"),
        ("raw=eeg&id=times", "floats lose the last digits of large ids"),
        ("raw=ids", "'ids' .* holds no numbers, so it is neither raw input nor features"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, option, message):
    ids = np.array([f"{n}" for n in range(COUNT)])
    np.savez(tmp_path / "f.npz", eeg=EEG, ids=ids, times=np.ones(COUNT))
    with pytest.raises(ValueError, match=message):
        open_source(f"arrays:{tmp_path}/f.npz?{option}")


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_mapped_file_that_is_cut_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(array_files, "_KEPT_BYTES", 100)
    if kind == "npy":
        np.save(tmp_path / "f.npy", EEG)
    else:
        np.savez(tmp_path / "f.npz", eeg=EEG)
    file = tmp_path / f"f.{kind}"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ValueError, match=f"f.{kind} cannot be read"):
        open_source(f"arrays:{file}?raw=eeg")


def test_hdf5_with_values_in_other_files_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(64))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("eeg", (8,), "f8", external=[(str(tmp_path / "secret"), 0, 64)])
    with pytest.raises(ValueError, match="values of the data set 'eeg' are in other files"):
        open_source(f"arrays:{tmp_path}/f.h5?raw=eeg")


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "f.h5").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'cwcl_jax\[hdf5\]'"):
        open_source(f"arrays:{tmp_path}/f.h5?raw=eeg")


def test_of_huge_arrays_spread_blocks_decide(monkeypatch):
    rows = np.arange(40_000, dtype=np.int32).reshape(-1, 4)
    whole = array_files.checksum(rows)
    monkeypatch.setattr(array_files, "_BLOCK_BYTES", 1024)
    assert array_files.checksum(rows) == whole
    monkeypatch.setattr(array_files, "_COUNTED_BYTES", 16 * 1024)
    part = array_files.checksum(rows)
    for place in (0, -1):
        changed = rows.copy()
        changed[place] += 1
        assert array_files.checksum(changed) != part
