import dataclasses
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingStore, EmbeddingWriter
from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import eval_batches, train_batches
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.modalities import FeatureInputs

LINE = "scenes:train?n=50"
COUNT, DIM = 50, 6
VECTORS = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)


def _description(**changes) -> EmbeddingDescription:
    description = EmbeddingDescription(
        tower="image",
        shape=(DIM,),
        dtype="float32",
        count=COUNT,
        source=open_source(LINE).fingerprint(),
        weights="abc",
        preprocessing={"size": 64},
        shard_size=16,
    )
    return dataclasses.replace(description, **changes)


def _write(folder, description=None, hosts=1, valid=None):
    description = description or _description()
    source = open_source(LINE)
    for host in range(hosts):
        writer = EmbeddingWriter(folder, description, process_index=host, process_count=hosts)
        for rows in writer.pending():
            ids = [source.read(i, ())["id"] for i in rows]
            found = list(VECTORS[rows.start : rows.stop])
            if valid is not None:
                found = [v if valid[i] else v[None][:0] for i, v in zip(rows, found, strict=True)]
            writer.write(rows, ids, found)


@pytest.mark.parametrize("hosts", [1, 3])
def test_vectors_come_back_in_order_whatever_the_hosts(tmp_path, hosts):
    _write(tmp_path, hosts=hosts)
    store = EmbeddingStore(tmp_path)
    assert len(store) == COUNT
    for index in (0, 15, 16, 49):
        name, vector = store[index]
        assert name == open_source(LINE).read(index, ())["id"]
        np.testing.assert_array_equal(vector, VECTORS[index])


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_half_precision_is_rounded_once_and_its_cost_is_told(tmp_path, dtype, numpy_dtype):
    writer = EmbeddingWriter(tmp_path, _description(dtype=dtype, shard_size=COUNT))
    writer.write(range(COUNT), ["a"] * COUNT, VECTORS)
    vector = EmbeddingStore(tmp_path)[3][1]
    assert vector.dtype == np.float32
    stored = VECTORS.astype(numpy_dtype).astype(np.float32)
    np.testing.assert_array_equal(vector, stored[3])
    lengths = [np.linalg.norm(rows, axis=1) for rows in (stored - VECTORS, VECTORS)]
    assert writer.rounding == pytest.approx(max(lengths[0] / lengths[1]), rel=1e-5)


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path):
    writer = EmbeddingWriter(tmp_path, _description(dtype="float16", count=1))
    with pytest.raises(ValueError, match=r"reach 7e\+04, which float16 cannot hold: .*bfloat16"):
        writer.write(range(1), ["a"], np.full((1, DIM), 7e4, np.float32))
    assert not list(tmp_path.glob("*.array_record*"))


def test_an_example_may_have_several_vectors(tmp_path):
    counts = np.arange(COUNT) % 4  # none where an example is unusable
    source = open_source(LINE)
    ids = [source.read(i, ())["id"] for i in range(COUNT)]
    several = [VECTORS[i] + np.arange(n, dtype=np.float32)[:, None] for i, n in enumerate(counts)]
    draws = {"draws": {"variants": "all"}, "shard_size": COUNT}
    EmbeddingWriter(tmp_path, _description(**draws)).write(range(COUNT), ids, several)
    store = EmbeddingStore(tmp_path)
    opened = open_source(f"{LINE}&features_from={tmp_path}")
    for index, vectors in enumerate(several):
        np.testing.assert_array_equal(store.variants(index)[1], vectors)
        if not counts[index]:
            assert store[index][1] is None
            continue
        example = opened.read(index, ("features",))
        np.testing.assert_array_equal(example["features"]["image"], VECTORS[index])
        assert ("variants" in example) == (counts[index] > 1)
    assert opened.vectors(np.array([1, 2])) is None
    np.testing.assert_array_equal(opened.vectors(np.array([1, 5]))["image"], VECTORS[[1, 5]])
    with pytest.raises(ValueError, match=r"stale: draws\.variants is"):
        EmbeddingWriter(tmp_path, _description(shard_size=COUNT))


def test_ids_of_file_names_that_are_no_utf8_come_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    writer = EmbeddingWriter(tmp_path, _description(count=2))
    writer.write(range(2), [name, "caf\u00e9.jpg"], VECTORS[:2])
    store = EmbeddingStore(tmp_path)
    assert [store[0][0], store[1][0]] == [name, "caf\u00e9.jpg"]
    assert store.rows(np.arange(2))[0] == [name, "caf\u00e9.jpg"]


def test_an_interrupted_run_continues_with_what_is_missing(tmp_path):
    source = open_source(LINE)
    writer = EmbeddingWriter(tmp_path, _description())
    rows = writer.pending()[1]
    ids = [source.read(i, ())["id"] for i in rows]
    writer.write(rows, ids, VECTORS[rows.start : rows.stop])
    assert not writer.is_complete()
    with pytest.raises(FileNotFoundError, match="3 of 4 files"):
        EmbeddingStore(tmp_path)
    # What a killed process leaves behind counts for nothing.
    _description().shard_path(tmp_path, 0).with_suffix(".unfinished").write_bytes(b"half")
    again = EmbeddingWriter(tmp_path, _description())
    assert [r.start for r in again.pending()] == [0, 32, 48]
    _write(tmp_path)
    assert again.is_complete()
    assert len(EmbeddingStore(tmp_path)) == COUNT


@pytest.mark.parametrize(
    "change",
    [{"weights": "other"}, {"preprocessing": {"size": 32}}, {"source": "x"}, {"dtype": "float16"}],
)
def test_a_folder_made_from_anything_else_is_refused(tmp_path, change):
    _write(tmp_path)
    with pytest.raises(ValueError, match=rf"stale: {next(iter(change))}[. ]"):
        EmbeddingWriter(tmp_path, _description(**change))


def test_what_differs_is_told_by_field_with_both_values(tmp_path):
    made = {"weights": "abc", "preprocessing": {"tower": {"depth": 2, "width": 8}, "size": 16}}
    EmbeddingWriter(tmp_path, _description(**made))
    wanted = {"tower": {"depth": 3, "width": 8}, "size": 16, "mean": 0.5}
    there = EmbeddingDescription.read(tmp_path)
    with pytest.raises(ValueError, match="are stale") as refused:
        there.require(tmp_path, weights="def", preprocessing=wanted)
    assert str(refused.value) == (
        f"The embeddings in {tmp_path} are stale: weights (a hash of the tower's files, or of a "
        "run's settings, and its step) is 'abc' there and 'def' here; preprocessing.mean is None "
        "there and 0.5 here; preprocessing.tower.depth is 2 there and 3 here. Make them again in "
        "another folder, or delete this one."
    )


def test_a_source_that_changed_is_refused(tmp_path):
    _write(tmp_path)
    with pytest.raises(ValueError, match="stale"):
        open_source(f"scenes:train?n=50&seed=1&features_from={tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"cwcl_jax\.embed"):
        open_source(f"{LINE}&features_from={tmp_path}/nowhere")


def test_wrong_shapes_and_counts_are_refused(tmp_path):
    writer = EmbeddingWriter(tmp_path, _description())
    rows = writer.pending()[0]
    with pytest.raises(ValueError, match="shape"):
        writer.write(rows, ["x"] * 16, np.zeros((16, 3)))
    with pytest.raises(ValueError, match="15 ids"):
        writer.write(rows, ["x"] * 15, np.zeros((16, DIM)))
    with pytest.raises(ValueError, match="float64"):
        _description(dtype="float64")


def test_training_reads_vectors_instead_of_pictures(tmp_path, monkeypatch):
    _write(tmp_path)

    def refuse(*_):
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr("cwcl_jax.synthetic.scenes.draw", refuse)
    config = DataConfig(train=f"{LINE}&features_from={tmp_path}", threads=1)
    batches = train_batches(config, ("image", "text"), seed=0, global_batch_size=10)
    batch = next(batches)
    np.testing.assert_array_equal(batch["image"]["features"], VECTORS[batch["index"]])
    plain = train_batches(DataConfig(train=LINE), ("text",), seed=0, global_batch_size=10)
    expected = next(plain)
    np.testing.assert_array_equal(batch["text"]["tokens"], expected["text"]["tokens"])
    assert batches.fingerprint() != plain.fingerprint()
    batches.close()
    plain.close()


def test_examples_that_could_not_be_embedded_are_skipped(tmp_path):
    valid = np.ones(COUNT, bool)
    valid[7] = False
    _write(tmp_path, valid=valid)
    source = open_source(f"{LINE}&features_from={tmp_path}")
    with pytest.raises(BadExample, match="features missing"):
        source[7]
    batches = list(eval_batches(source, DataConfig(threads=1), ("image",), batch_size=25))
    assert np.flatnonzero(~np.concatenate([b["valid"] for b in batches])).tolist() == [7]


def test_ids_that_do_not_belong_are_an_error(tmp_path):
    writer = EmbeddingWriter(tmp_path, _description(shard_size=64))
    writer.write(writer.pending()[0], [f"other {i}" for i in range(COUNT)], VECTORS)
    with pytest.raises(ValueError, match="belongs to 'other 0'"):
        open_source(f"{LINE}&features_from={tmp_path}")[0]


def test_vectors_alone_are_a_source(tmp_path):
    _write(tmp_path)
    source = open_source(f"embeddings:{tmp_path}")
    assert source.embedded == ("image",)
    (batch,) = eval_batches(source, DataConfig(threads=1), ("image",), batch_size=COUNT)
    np.testing.assert_array_equal(batch["image"]["features"], VECTORS)
    config = DataConfig(inputs={"profile": FeatureInputs()})
    with pytest.raises(ValueError, match="no features for the tower 'profile'"):
        eval_batches(source, config, ("profile",), batch_size=5)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_features_of_users_keep_their_shape(tmp_path, kind):
    profiles = np.random.default_rng(1).normal(size=(9, 3, 4)).astype(np.float32)
    profiles[5, 0, 0] = np.nan
    arrays = {"profile": profiles, "image": VECTORS[:9], "labels": np.arange(9)}
    if kind == "npz":
        texts = np.array([f"treatment {i}" for i in range(9)])
        np.savez(tmp_path / "f.npz", ids=np.array(list("abcdefghi")), text=texts, **arrays)
    else:
        save_file(arrays, tmp_path / "f.safetensors")
    source = open_source(f"arrays:{tmp_path}/f.{kind}")
    assert set(source.embedded) == {"profile", "image"}
    assert source[2]["label"] == 2
    np.testing.assert_array_equal(source[2]["features"]["profile"], profiles[2])
    with pytest.raises(BadExample, match="not finite"):
        source[5]
    if kind == "npz":
        assert (source[2]["id"], source[2]["text"]) == ("c", "treatment 2")
        inputs = usual_inputs() | {"profile": FeatureInputs()}
        config = DataConfig(train=f"arrays:{tmp_path}/f.npz", threads=1, inputs=inputs)
        batches = train_batches(config, ("profile", "text"), seed=0, global_batch_size=4)
        batch = next(batches)
        np.testing.assert_array_equal(batch["profile"]["features"], profiles[batch["index"]])
        # The reader runs ahead, perhaps into the next epoch: how often it met the bad one is open.
        assert set(batches.skipped) <= {"features not finite"}
        batches.close()


def test_arrays_of_unequal_length_are_refused(tmp_path):
    np.savez(tmp_path / "f.npz", image=np.zeros((3, 2)), ids=np.arange(4))
    with pytest.raises(ValueError, match="differ in length"):
        open_source(f"arrays:{tmp_path}/f.npz")


@pytest.fixture(params=["arrays", "embeddings", "beside a source"])
def vector_source(request, tmp_path):
    """A source of nothing but vectors, whose example 7 is unusable."""
    if request.param == "arrays":
        vectors = VECTORS.copy()
        vectors[7, 0] = np.inf
        np.savez(tmp_path / "f.npz", image=vectors)
        return open_source(f"arrays:{tmp_path}/f.npz")
    valid = np.arange(COUNT) != 7
    _write(tmp_path / "store", valid=valid)
    line = f"{LINE}&features_from=" if request.param == "beside a source" else "embeddings:"
    return open_source(f"{line}{tmp_path}/store")


def _batches(source, count):
    config = DataConfig(train="given", threads=1, max_skipped_share=0.1)
    batches = train_batches(config, ("image",), seed=0, global_batch_size=10, source=source)
    found = [next(batches) for _ in range(count)]
    skipped = dict(batches.skipped)
    batches.close()
    return found, skipped


def test_vectors_are_read_many_at_once(vector_source, monkeypatch):
    def refuse(*_):
        raise AssertionError("an example was read alone")

    rows = np.array([3, 30, 3])
    if not hasattr(vector_source, "source"):  # which is asked for the ids
        monkeypatch.setattr(type(vector_source), "read", refuse)
    found = vector_source.vectors(rows)["image"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTORS[rows])
    assert vector_source.vectors(np.array([3, 7])) is None


def test_many_at_once_give_the_batches_of_one_by_one(vector_source, monkeypatch):
    # Two epochs, so that the unusable one comes up, in one of the two chunks of a batch.
    monkeypatch.setattr("cwcl_jax.data.pipeline._VECTOR_CHUNK", 5)
    fast, skipped = _batches(vector_source, 10)
    assert skipped.keys() <= {"features not finite", "features missing"}
    assert skipped
    monkeypatch.setattr(type(vector_source), "vectors", lambda *_: None)
    slow, _ = _batches(vector_source, 10)
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_array_equal(a["image"]["features"], b["image"]["features"])
        np.testing.assert_array_equal(a["image"]["features"], VECTORS[a["index"]])


def test_training_refuses_ids_that_do_not_belong(tmp_path):
    writer = EmbeddingWriter(tmp_path, _description(shard_size=64))
    writer.write(writer.pending()[0], [f"other {i}" for i in range(COUNT)], VECTORS)
    with pytest.raises(ValueError, match="belongs to 'other"):
        _batches(open_source(f"{LINE}&features_from={tmp_path}"), 1)


def test_a_stored_vector_of_zeros_is_named_and_not_used(tmp_path):
    rows = VECTORS.copy()
    rows[7] = 0
    writer = EmbeddingWriter(tmp_path, _description(shard_size=64))
    source = open_source(LINE)
    ids = [source.read(i, ())["id"] for i in range(COUNT)]
    writer.write(range(COUNT), ids, rows)
    for line in (f"embeddings:{tmp_path}", f"{LINE}&features_from={tmp_path}"):
        opened = open_source(line)
        with pytest.raises(BadExample, match=f"features all zero: {ids[7]}"):
            opened.read(7, ("features",))
        assert opened.vectors(np.array([6, 7])) is None
        assert opened.vectors(np.array([5, 6]))["image"].shape == (2, DIM)
    with pytest.raises(BadExample, match="item 1"):
        FeatureInputs().batch([np.ones(3), np.zeros(3)])


@pytest.mark.parametrize("count", [40, pytest.param(120, marks=pytest.mark.slow)])
def test_damaged_features_are_told(tmp_path, count):
    """Flipped bits and zeroed blocks in any file: the same vectors or an error, nothing else."""
    _write(tmp_path / "whole")
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(count):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        path = rng.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        place = rng.choice(np.flatnonzero(np.frombuffer(content, np.uint8)))  # no padding
        if number % 2:
            content[place] ^= 1 << rng.integers(8)
        else:
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        path.write_bytes(content)
        try:
            store = EmbeddingStore(folder)
            _, vectors = store.rows(np.arange(COUNT))
        except ValueError as error:
            refused += 1
            told = str(error)
            assert str(folder) in told
            continue
        if store.description == _description():  # else it would be called stale
            np.testing.assert_array_equal(vectors, VECTORS)
    assert refused > count // 2
