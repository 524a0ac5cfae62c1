"""Parquet files: which column is what, random access, damage, and what makes two files differ."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources import row_groups as row_groups_module
from cwcl_jax.data.sources.base import require_fields
from cwcl_jax.modalities import ImageInputs
from tests.data.arrow_making import MEDIA, eeg, table, with_features, write_parquet
from tests.data.making import jpeg, sound


@pytest.fixture
def files(tmp_path):
    """Three files of 10, 7 and 3 examples."""
    first = 0
    for number, count in enumerate((10, 7, 3)):
        rows = with_features(table(count, first))
        write_parquet(tmp_path / f"train-{number:05d}-of-00003.parquet", rows)
        first += count
    return tmp_path


@pytest.mark.parametrize("keep", ["", "&keep={}/kept"])
@pytest.mark.parametrize("pattern", ["", "/train-{00000..00002}-of-00003.parquet", "/*.parquet"])
def test_rows_of_several_files_come_in_order(files, pattern, keep):
    line = f"parquet:{files}{pattern}?memory_mib=1{keep.format(files)}"
    source = open_source(line)
    assert (len(source), source.class_names) == (20, ["cat", "dog", "cow"])
    for index in np.random.default_rng(0).permutation(20).tolist():
        assert source[index] == {
            "id": f"train-0000{0 if index < 10 else 1 if index < 17 else 2}-of-00003.parquet/"
            f"{index if index < 10 else index - 10 if index < 17 else index - 17}",
            "image": jpeg(index),
            "text": f"caption {index}",
            "label": index % 3,
        }


def test_only_the_columns_of_the_fields_are_decoded(files, monkeypatch):
    asked = []
    decode = row_groups_module.RowGroups._decode
    monkeypatch.setattr(
        row_groups_module.RowGroups,
        "_decode",
        lambda self, number, tops: asked.append(list(tops)) or decode(self, number, tops),
    )
    source = open_source(f"parquet:{files}")
    assert source.read(3, ()) == {"id": "train-00000-of-00003.parquet/3"}
    assert source.read(3, ("text", "eeg")).keys() == {"id", "text"}
    assert source.read(3, {"label"})["label"] == 0
    assert asked == [["caption"], ["label"]]
    # The same row group is decoded once.
    source.read(2, ("text",))
    assert len(asked) == 2


def test_threads_read_the_same_from_a_small_cache(tmp_path, monkeypatch, caplog):
    rows = table(24, pad=pa.array([bytes([n]) * 200_000 for n in range(24)]))
    write_parquet(tmp_path / "a.parquet", rows, group=3)
    source = open_source(f"parquet:{tmp_path}/a.parquet?audio=pad&memory_mib=1")
    order = np.random.default_rng(1).integers(24, size=200).tolist()
    with ThreadPoolExecutor(6) as pool:
        for index, example in zip(order, pool.map(source.__getitem__, order), strict=True):
            assert example["audio"] == bytes([index]) * 200_000
            assert example["text"] == f"caption {index}"
    assert source._store._kept._bytes <= 1 << 20
    assert len([r for r in caplog.records if "keep=auto" in r.message]) == 1


def test_a_row_group_that_several_threads_want_is_decoded_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", table(4))
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    calls, meet = [], threading.Barrier(4)
    decode = row_groups_module.RowGroups._decode
    monkeypatch.setattr(
        row_groups_module.RowGroups,
        "_decode",
        # Not those of the labels alone, of which the classes are found.
        lambda self, number, tops: (
            ("caption" in tops and calls.append(number)) or decode(self, number, tops)
        ),
    )

    def read(index):
        meet.wait()
        return source[index]["text"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [f"caption {n}" for n in range(4)]
    assert calls == [0]


def test_raw_inputs_and_features_are_those_that_the_line_names(tmp_path):
    lists = pa.array([eeg(n).tolist() for n in range(6)], pa.list_(pa.list_(pa.float32(), 5)))
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([eeg(n) for n in range(6)]))
    vectors = pa.array([[n + 1, 2, 3] for n in range(6)], pa.list_(pa.int16()))
    columns = {"signal": lists, "tensor": tensors, "clip": vectors, "age": pa.array(range(6))}
    write_parquet(tmp_path / "a.parquet", table(6, **columns))
    line = f"parquet:{tmp_path}/a.parquet?raw=eeg:signal,tensor,age&features=image:clip"
    source = open_source(line)
    assert source.embedded == ("image",)
    example = source[4]
    for name in ("eeg", "tensor"):
        np.testing.assert_array_equal(example[name], eeg(4))
        assert example[name].dtype == np.float32
        example[name][:] = 0  # the caller's own
    np.testing.assert_array_equal(source.read(4, ("eeg",))["eeg"], eeg(4))
    assert (int(example["age"]), example["age"].dtype) == (4, np.int64)
    np.testing.assert_array_equal(example["features"]["image"], np.float32([5, 2, 3]))
    found = source.vectors(np.array([5, 0]))
    np.testing.assert_array_equal(found["image"], np.float32([[6, 2, 3], [1, 2, 3]]))
    many = open_source(f"parquet:{tmp_path}/a.parquet?features=a:tensor,b:signal,c:age")
    found = many.vectors(np.array([4, 1]))
    for name in "ab":
        np.testing.assert_array_equal(found[name], [eeg(4), eeg(1)])
    np.testing.assert_array_equal(found["c"], np.float32([4, 1]))
    # The very same columns under other names are other data.
    other = open_source(line.replace("image:clip", "text:clip"))
    assert other.fingerprint() != source.fingerprint()


def test_numbers_that_cannot_be_used_are_bad_examples_by_id(tmp_path):
    signals = [[[1.0], [2.0]], [[1.0], [float("nan")]], [[1.0], []], None, [[1.0], [None]]]
    vectors = [[1.0, 2.0], [0.0, 0.0], [1.0], [float("inf"), 1.0], None]
    ids = [2**62 + n for n in range(5)]
    columns = {"eeg": pa.array(signals), "clip": pa.array(vectors), "id": pa.array(ids)}
    write_parquet(tmp_path / "a.parquet", table(5, **columns))
    source = open_source(f"parquet:{tmp_path}/a.parquet?raw=eeg&features=image:clip")
    assert source.read(0, ("features", "eeg"))["id"] == "4611686018427387904"
    for index, kind in enumerate(["not finite", "ragged", "missing", "not finite"], 1):
        with pytest.raises(BadExample, match=f"eeg {kind}: {ids[index]}"):
            source.read(index, ("eeg",))
    for index, kind in enumerate(["all zero", "of another shape", "not finite", "missing"], 1):
        with pytest.raises(BadExample, match=f"features {kind}: {ids[index]}"):
            source.read(index, ("features",))
    assert source.vectors(np.array([0, 1])) is None
    # What is not asked for does no harm.
    assert source.read(1, ("text",))["text"] == "caption 1"


def test_captions_may_be_lists_dictionaries_members_or_several_columns(tmp_path):
    inner = pa.array([{"caption": f"inner {n}", "n": n} for n in range(3)])
    raws = pa.array([[{"raw": f"a{n}"}, {"raw": f"b{n}"}] for n in range(3)])
    columns = {
        "many": pa.array([["one", None, "two"], [], None]),
        "word": pa.array(["x", "y", "x"]).dictionary_encode(),
        "json": inner,
        "sentences": raws,
        "dot.ted": pa.array(["d"] * 3),
    }
    write_parquet(tmp_path / "a.parquet", table(3, **columns))

    def texts(option):
        source = open_source(f"parquet:{tmp_path}/a.parquet?text={option}")
        return [source[index].get("text") for index in range(3)]

    assert texts("many") == [["one", "two"], [], None]
    assert texts("word") == ["x", "y", "x"]
    assert texts("json.caption") == ["inner 0", "inner 1", "inner 2"]
    assert texts("sentences.raw") == [[f"a{n}", f"b{n}"] for n in range(3)]
    assert texts("dot.ted") == ["d"] * 3
    assert texts("caption,many")[0] == ["caption 0", "one", "two"]
    assert texts("caption,many")[2] == ["caption 2"]


def test_labels_are_numbers_names_or_stored_names(tmp_path):
    columns = {
        "word": pa.array(["dog", " cat", None, "dog", ""]),
        "kind": pa.array(["b", "a", "b", "c", "c"]).dictionary_encode(),
        "digit": pa.array(["3", "10", "7", "3", "3"]),
        "big": pa.array([2**53 + 1, 0, 1, 2, 3]),
    }
    write_parquet(tmp_path / "a.parquet", table(5, **columns))

    def labels(option):
        source = open_source(f"parquet:{tmp_path}/a.parquet?label={option}")
        return source.class_names, [source[index].get("label") for index in range(5)]

    assert labels("word") == (["cat", "dog"], [1, 0, None, 1, None])
    assert labels("kind") == (["a", "b", "c"], [1, 0, 1, 2, 2])
    assert labels("digit") == (None, [3, 10, 7, 3, 3])
    assert labels("big") == (None, [2**53 + 1, 0, 1, 2, 3])
    stored = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    unknown = table(3, label=pa.array([1, -1, 2]))
    write_parquet(tmp_path / "b.parquet", with_features(unknown, stored))
    source = open_source(f"parquet:{tmp_path}/b.parquet")
    assert source[0]["label"] == 1
    for index in (1, 2):
        with pytest.raises(BadExample, match=r"label unreadable.* not one of the 2 classes"):
            source.read(index, ("label",))


def test_pictures_and_sound_are_bytes_structs_or_paths_below_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(9))
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "gone.jpg", "\0"]
    media = [{"bytes": None, "path": path} for path in paths]
    wav = sound()
    columns = {
        "image": pa.array(media, MEDIA),
        "name": pa.array(paths),
        "plain": pa.array([jpeg(n) for n in range(6)], pa.large_binary()),
        "wav": pa.array([wav] * 6),
    }
    write_parquet(tmp_path / "in" / "a.parquet", table(6, **columns))
    for option in ("", "image=name"):
        source = open_source(f"parquet:{tmp_path}/in/a.parquet?{option}")
        assert (source[0]["image"], source[0]["audio"]) == (jpeg(9), wav)
        for index in (1, 2, 3):
            with pytest.raises(BadExample, match=r"outside of the folder: .*root=FOLDER"):
                source.read(index, ("image",))
        with pytest.raises(BadExample, match="file missing"):
            source.read(4, ("image",))
        with pytest.raises(BadExample, match="file unreadable"):
            source.read(5, ("image",))
    assert open_source(f"parquet:{tmp_path}/in/a.parquet?image=plain")[3]["image"] == jpeg(3)
    wider = open_source(f"parquet:{tmp_path}/in/a.parquet?root={tmp_path}&image=name")
    assert wider[2]["image"] == b"secret"


def test_two_columns_that_may_be_a_field_are_an_error_when_it_is_needed(tmp_path):
    columns = {
        "text": pa.array(["t"] * 2),
        "img": pa.array([b"i"] * 2),
        "eeg": pa.array([[1.0]] * 2),
    }
    write_parquet(tmp_path / "a.parquet", table(2, **columns))
    line = f"parquet:{tmp_path}/a.parquet"
    source = open_source(line)
    assert source[0].keys() == {"id", "label"}
    for field, message in [
        ("text", r"2 columns that could be the text \(text, caption\); choose with text=COLUMN"),
        ("image", r"2 columns that could be the image \(image, img\)"),
        ("audio", r"no audio; name its column with audio= \(it has image \(struct"),
        ("eeg", "'eeg' that the line does not use; add raw=eeg or features=eeg"),
    ]:
        with pytest.raises(ValueError, match=message):
            require_fields(source, {field}, line)
    chosen = open_source(f"{line}?text=text&image=img")
    assert chosen[0] == {"id": "a.parquet/0", "text": "t", "image": b"i", "label": 0}
    # Features that are stored leave no doubt.
    write_parquet(tmp_path / "a.parquet", with_features(table(2, **columns)))
    assert open_source(f"{line}?text=text")[1]["image"] == jpeg(1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("text=captoin", "no column 'captoin'.*Did you mean 'caption'.*Its columns: image"),
        ("text=label", r"'label' of .* is int64, so it cannot be text=, which takes a string or"),
        ("label=image", "cannot be label=, which takes an integer or a string"),
        ("image=label", "cannot be image=, which takes bytes"),
        ("raw=caption", "cannot be raw=caption=, which takes numbers"),
        ("raw=label:label", "'label' cannot name a raw array .*write raw=NAME:label"),
        ("raw=a:label&features=a:label", "'a' is named by raw= and by features="),
        ("raw=a:label,a:label", "must be different names"),
        ("image=image&raw=image:label", "named by image= and by raw="),
        ("label=label,caption", "must be one column"),
        ("memory_mib=0", "memory_mib=0 of .* at least 1"),
        ("split=train", "split='train' chooses files of a folder"),
        ("colour=x", "no option 'colour'"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, option, message):
    write_parquet(tmp_path / "a.parquet", table(2))
    with pytest.raises(ValueError, match=message):
        open_source(f"parquet:{tmp_path}/a.parquet?{option}")


def test_integers_that_pandas_made_floats_get_a_remedy(tmp_path):
    columns = {"class_id": pa.array([1.0, None])}
    write_parquet(tmp_path / "a.parquet", table(2, **columns))
    with pytest.raises(ValueError, match=r"is double, so .*label=.*astype\('Int64'\)"):
        open_source(f"parquet:{tmp_path}/a.parquet?label=class_id")


def test_a_folder_of_several_splits_asks_for_one(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", table(count))
    with pytest.raises(ValueError, match="holds the splits test, train; choose one with split="):
        open_source(f"parquet:{tmp_path}")
    assert len(open_source(f"parquet:{tmp_path}?split=test")) == 2
    with pytest.raises(ValueError, match=r"no files of split='dev'; it has test, train"):
        open_source(f"parquet:{tmp_path}?split=dev")
    with pytest.raises(
        FileNotFoundError, match=r"holds no .parquet files. Its folders .*: name one"
    ):
        open_source(f"parquet:{tmp_path.parent}")
    with pytest.raises(FileNotFoundError, match="Parquet file was not found"):
        open_source(f"parquet:{tmp_path}/gone.parquet")


def test_files_that_disagree_are_refused_where_it_matters(tmp_path):
    def other(rows):
        write_parquet(tmp_path / "b.parquet", rows)
        return open_source(f"parquet:{tmp_path}/?text=caption")

    write_parquet(tmp_path / "a.parquet", with_features(table(3, note=pa.array(["n"] * 3))))
    with pytest.raises(
        ValueError, match=r"'caption' is string in .*a.parquet and int64 in .*b.par"
    ):
        other(with_features(table(2, caption=pa.array([1, 2]))))
    with pytest.raises(ValueError, match=r"'caption' is string .* missing in .*b.parquet"):
        other(with_features(table(2).drop(["caption"])))
    names = {"label": {"_type": "ClassLabel", "names": ["dog", "cat", "cow"]}}
    with pytest.raises(ValueError, match=r"classes of 'label' in .*b.parquet are not those"):
        other(with_features(table(2), names))
    # Columns that nobody reads, dictionaries, and a part without any value are no matter.
    fine = table(2, caption=pa.array(["u", "v"]).dictionary_encode(), label=pa.nulls(2))
    source = other(with_features(fine))
    assert source[4]["text"] == "v"
    assert "label" not in source[4]
    kept = open_source(f"parquet:{tmp_path}/?text=caption&keep={tmp_path}/kept")
    assert kept[4] == source[4]


def test_damaged_files_are_refused_or_their_rows_skipped(files):
    path = files / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) - 5):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"00001-of-00003.parquet is not a complete"):
            open_source(f"parquet:{files}")
    # The footer is right, the data of one row group is not.
    path.write_bytes(whole)
    group = pq.read_metadata(path).row_group(1)
    column = group.column(2)  # captions
    assert column.path_in_schema == "caption"
    first = column.dictionary_page_offset or column.data_page_offset
    broken = bytearray(whole)
    broken[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(broken)
    source = open_source(f"parquet:{files}")
    for index in range(20):
        if index in (14, 15, 16):
            with pytest.raises(BadExample, match="parquet unreadable: train-00001"):
                source.read(index, ("text",))
        else:
            assert source.read(index, ("text",))["text"] == f"caption {index}"
    assert source.read(15, ("label",))["label"] == 0
    with pytest.raises(ValueError, match=r"(?s)cannot be unpacked to .* Without keep="):
        open_source(f"parquet:{files}?keep={files}/kept")[0]


def test_the_fingerprint_follows_content_names_and_columns(files):
    line = f"parquet:{files}"
    before = open_source(line).fingerprint()
    assert open_source(f"{line}?keep={files}/kept&memory_mib=7").fingerprint() == before
    assert open_source(f"{line}?label=label&image=image").fingerprint() == before
    assert open_source(f"{line}?text=caption&id=caption").fingerprint() != before
    path = files / "train-00002-of-00003.parquet"
    for rows in (
        with_features(table(3, 18)),
        with_features(table(3, 17, caption=pa.array(["caption 17", "caption 18", "caption 1X"]))),
    ):
        write_parquet(path, rows)
        assert open_source(line).fingerprint() != before
    write_parquet(path, with_features(table(3, 17)))
    assert open_source(line).fingerprint() == before
    path.rename(files / "train-00003-of-00003.parquet")
    assert open_source(line).fingerprint() != before


def test_a_source_travels_to_other_processes(files):
    for option in ("", f"?keep={files}/kept"):
        source = open_source(f"parquet:{files}{option}")
        source[3]
        copy = pickle.loads(pickle.dumps(source))
        assert copy[3] == source[3]
        assert copy.fingerprint() == source.fingerprint()


def test_training_reads_every_example_once_an_epoch_and_resumes(files):
    inputs = usual_inputs() | {"image": ImageInputs(size=8)}
    config = DataConfig(train=f"parquet:{files}?memory_mib=1", inputs=inputs, threads=3)

    def batches():
        return train_batches(config, ("image", "text"), seed=3, global_batch_size=5)

    reading = batches()
    seen = [next(reading) for _ in range(8)]
    state = reading.get_state()
    following = next(reading)
    reading.close()
    for epoch in (seen[:4], seen[4:]):
        assert sorted(np.concatenate([batch["index"] for batch in epoch])) == list(range(20))
    assert any((a["index"] != b["index"]).any() for a, b in pairwise(seen))
    again = batches()
    again.set_state(state)
    resumed = next(again)
    again.close()
    np.testing.assert_array_equal(resumed["index"], following["index"])
    np.testing.assert_array_equal(resumed["image"]["pixels"], following["image"]["pixels"])
