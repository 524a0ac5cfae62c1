"""Folders that `datasets` saves: files of pyarrow in the same layout, and those of `datasets`."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.base import require_fields
from tests.data.arrow_making import MEDIA, eeg, table, write_saved, write_stream
from tests.data.making import jpeg


def test_rows_of_several_files_come_in_order(tmp_path):
    write_saved(tmp_path, [table(10), table(5, 10)])
    source = open_source(f"hf:{tmp_path}")
    assert (len(source), source.class_names) == (15, ["cat", "dog", "cow"])
    for index in np.random.default_rng(0).permutation(15).tolist():
        assert source[index] == {
            "id": f"data-0000{index // 10}-of-00002.arrow/{index % 10}",
            "image": jpeg(index),
            "text": f"caption {index}",
            "label": index % 3,
        }
    copy = pickle.loads(pickle.dumps(source))
    assert (copy[12], copy.fingerprint()) == (source[12], source.fingerprint())
    with pytest.raises(ValueError, match="has no audio; name its column"):
        require_fields(source, {"audio"}, "x")


def test_an_order_that_is_saved_beside_the_rows_is_obeyed(tmp_path):
    indices = [7, 0, 7, 3]
    write_saved(tmp_path / "a", [table(10)], indices=indices)
    source = open_source(f"hf:{tmp_path}/a")
    assert [source[n]["text"] for n in range(len(source))] == [f"caption {n}" for n in indices]
    assert source[2]["id"] == "data-00000-of-00001.arrow/7"
    before = source.fingerprint()
    write_saved(tmp_path / "a", [table(10)], indices=indices[::-1])
    assert open_source(f"hf:{tmp_path}/a").fingerprint() != before
    write_saved(tmp_path / "b", [table(10)], indices=[3, 10])
    with pytest.raises(ValueError, match=r"indices of .* name row 10 of 10"):
        open_source(f"hf:{tmp_path}/b")


def test_splits_are_folders_and_one_is_chosen(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        write_saved(tmp_path / split, [table(count)])
    listing = tmp_path / "dataset_dict.json"
    listing.write_text(json.dumps({"splits": ["train", "test"]}))
    assert len(open_source(f"hf:{tmp_path}?split=test")) == 2
    assert len(open_source(f"hf:{tmp_path}/train")) == 6
    with pytest.raises(ValueError, match="has several splits; choose with split=: train, test"):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="has no split 'dev'; choose"):
        open_source(f"hf:{tmp_path}?split=dev")
    with pytest.raises(ValueError, match="is one data set without splits"):
        open_source(f"hf:{tmp_path}/train?split=train")
    listing.write_text(json.dumps({"splits": ["test"]}))
    assert len(open_source(f"hf:{tmp_path}")) == 2
    listing.write_text(json.dumps({"splits": ["../elsewhere"]}))
    with pytest.raises(ValueError, match="not the name of a folder next to it"):
        open_source(f"hf:{tmp_path}")


def test_numbers_and_lists_of_captions(tmp_path):
    columns = {
        "eeg": pa.array([eeg(n).tolist() for n in range(4)], pa.list_(pa.list_(pa.float32()))),
        "clip": pa.array([[n + 1.0, 0.0] for n in range(4)], pa.list_(pa.float32(), 2)),
        "caps": pa.array([["a", "b"]] * 4),
    }
    write_saved(tmp_path, [table(4, **columns)])
    source = open_source(f"hf:{tmp_path}?raw=eeg&features=image:clip&text=caps&id=caption")
    example = source[2]
    np.testing.assert_array_equal(example["eeg"], eeg(2))
    np.testing.assert_array_equal(example["features"]["image"], np.float32([3, 0]))
    assert (example["text"], example["id"]) == (["a", "b"], "caption 2")
    assert source.embedded == ("image",)


def test_vectors_follow_the_order_and_fall_back_where_rows_differ(tmp_path):
    clips = pa.array([[n + 1.0, 0.0] for n in range(9)], pa.list_(pa.float32()))
    write_saved(tmp_path / "a", [table(9, clip=clips)], indices=[8, 2, 2, 5])
    source = open_source(f"hf:{tmp_path}/a?features=image:clip")
    found = source.vectors(np.array([3, 0, 1]))["image"]
    np.testing.assert_array_equal(found, np.float32([[6, 0], [9, 0], [3, 0]]))
    np.testing.assert_array_equal(found[0], source[3]["features"]["image"])
    assert pickle.loads(pickle.dumps(source))._matrices is None
    for bad in ([1.0], None, [None, 1.0]):
        rows = pa.array([[1.0, 2.0], bad, [3.0, 4.0]])
        write_saved(tmp_path / "b", [table(3, clip=rows)])
        assert open_source(f"hf:{tmp_path}/b?features=image:clip").vectors(np.arange(1)) is None


def test_a_path_outside_of_the_folder_is_a_bad_example(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    media = pa.array([{"bytes": None, "path": "../secret.jpg"}], MEDIA)
    write_saved(tmp_path / "a", [table(1, image=media)])
    with pytest.raises(BadExample, match="outside of the folder"):
        open_source(f"hf:{tmp_path}/a").read(0, ("image",))


def _cut(folder):
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_at_a_batch(folder):
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])


def _other_columns(folder):
    write_stream(folder / "b.arrow", table(3).drop(["label"]))
    names = [{"filename": "data-00000-of-00001.arrow"}, {"filename": "b.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))


def _outside(folder):
    write_stream(folder.parent / "b.arrow", table(3))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../b.arrow"}]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "data-00000-of-00001.arrow cannot be read: the end of the file is missing"),
        (_cut_at_a_batch, "cannot be read: the end of the file is missing"),
        (_other_columns, "columns of .*b.arrow are not those of .*data-00000-of-00001.arrow"),
        (_outside, r"state.json of .* names .*\.\./b.arrow, outside of the folder"),
        (lambda f: (f / "state.json").write_text("{}"), "lists no data files"),
        (lambda f: (f / "state.json").write_text('{"_data_files": []}'), "has no examples"),
        (lambda f: (f / "state.json").write_text("["), "state.json cannot be read"),
        (lambda f: (f / "dataset_info.json").unlink(), "dataset_info.json cannot be read"),
        (lambda f: (f / "state.json").unlink(), "has neither dataset_dict.json nor state.json"),
        (lambda f: (f / "data-00000-of-00001.arrow").unlink(), "is missing: copy it again"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = tmp_path / "a"
    write_saved(folder, [table(8)])
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(f"hf:{folder}")


def test_names_of_the_hub_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hf:owner/name is not a folder.*save_to_disk"):
        open_source("hf:owner/name")


def test_the_fingerprint_follows_content(tmp_path):
    write_saved(tmp_path, [table(8)])
    before = open_source(f"hf:{tmp_path}").fingerprint()
    assert open_source(f"hf:{tmp_path}?text=caption").fingerprint() == before
    assert open_source(f"hf:{tmp_path}?text=caption&id=caption").fingerprint() != before
    write_saved(tmp_path, [table(8, caption=pa.array(["caption X"] * 8))])
    assert open_source(f"hf:{tmp_path}").fingerprint() != before
    write_saved(tmp_path, [table(8)])
    assert open_source(f"hf:{tmp_path}").fingerprint() == before


@pytest.mark.slow
def test_what_datasets_and_pandas_write(tmp_path):
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "sound": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["cat", "dog", "cow"]),
            "caption": datasets.Value("string"),
            "caps": datasets.List(datasets.Value("string")),
            "eeg": datasets.Array2D((3, 5), "float32"),
            "clip": datasets.List(datasets.Value("float32"), length=2),
        }
    )
    count = 12
    rows = {
        "image": [{"bytes": jpeg(n), "path": None} for n in range(count)],
        "sound": [{"bytes": bytes([n]) * 50, "path": f"{n}.wav"} for n in range(count)],
        "label": [n % 3 for n in range(count)],
        "caption": [f"caption {n}" for n in range(count)],
        "caps": [["one", f"two {n}"] for n in range(count)],
        "eeg": [eeg(n) for n in range(count)],
        "clip": [[n, 1.0] for n in range(count)],
    }
    # Encoding would need another package; sound that is there already needs none.
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole = whole.cast_column("sound", datasets.Audio())
    mixed = whole.shuffle(seed=1).select(range(9))
    splits = {"train": mixed, "test": whole.select([2])}
    datasets.DatasetDict(splits).save_to_disk(
        str(tmp_path / "saved"), num_shards={"train": 2, "test": 1}
    )
    mixed.to_parquet(str(tmp_path / "a.parquet"))
    order = [int(caption.split()[1]) for caption in mixed["caption"]]
    options = "raw=eeg&features=image:clip&text=caps"
    for line in (
        f"hf:{tmp_path}/saved?split=train&{options}",
        f"parquet:{tmp_path}/a.parquet?{options}",
    ):
        source = open_source(line)
        assert (len(source), source.class_names) == (9, ["cat", "dog", "cow"])
        for index, number in enumerate(order):
            example = source[index]
            assert example["image"] == jpeg(number)
            assert example["audio"] == bytes([number]) * 50
            assert (example["label"], example["text"]) == (number % 3, ["one", f"two {number}"])
            np.testing.assert_array_equal(example["eeg"], eeg(number))
            np.testing.assert_array_equal(example["features"]["image"], np.float32([number, 1]))
    frame = pandas.DataFrame({name: rows[name] for name in ("caption", "caps", "clip")})
    frame["image"] = [jpeg(n) for n in range(count)]
    frame["label"] = pandas.Categorical(["cow", "cat", "dog"] * 4)
    frame.to_parquet(tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}/b.parquet?text=caption&features=image:clip")
    assert source.class_names == ["cat", "cow", "dog"]
    assert (source[5]["image"], source[5]["label"], source[5]["text"]) == (jpeg(5), 2, "caption 5")
