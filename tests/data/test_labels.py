"""Labels in training batches: which pairs of a batch are alike."""

import numpy as np
import pytest

from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import eval_batches, train_batches
from cwcl_jax.data.sources import open_source
from cwcl_jax.modalities import FeatureInputs, TextInputs


def _batch(train: str, labels: str, modalities=("text",), size=32):
    inputs = usual_inputs() | {"text": TextInputs(max_tokens=16)}
    config = DataConfig(train=train, labels=labels, threads=1, inputs=inputs)
    batches = train_batches(config, modalities, seed=0, global_batch_size=size)
    batch = next(batches)
    batches.close()
    return batch


def test_class_labels_are_the_sources():
    line = "scenes:test?task=shape&n=64&size=16"
    batch = _batch(line, "class", ("image", "text"))
    source = open_source(line)
    expected = [source.read(int(i), {"label"})["label"] for i in batch["index"]]
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], expected)


def test_text_labels_are_equal_where_captions_are(tmp_path):
    texts = ["a red star", "A red star ", "a blue moon", "a green ring"] * 8
    rows = [f"{i}\t{text}" for i, text in enumerate(texts)]
    (tmp_path / "t.tsv").write_text("id\ttext\n" + "\n".join(rows) + "\n")
    batch = _batch(f"tsv:{tmp_path}/t.tsv?text=text", "text")
    kinds = np.array([{0: 0, 1: 0, 2: 2, 3: 3}[int(i) % 4] for i in batch["index"]])
    same = batch["label"][:, None] == batch["label"][None, :]
    np.testing.assert_array_equal(same, kinds[:, None] == kinds[None, :])
    assert batch["label"].min() >= 0


def test_without_the_option_batches_carry_no_labels():
    assert "label" not in _batch("scenes:train?n=64", "")


def test_class_labels_need_a_source_with_classes():
    with pytest.raises(ValueError, match=r"'scenes:train\?n=64' has no classes"):
        _batch("scenes:train?n=64", "class")


def test_classes_may_be_numbers_without_names(tmp_path):
    labels = np.arange(40) % 10
    np.savez(tmp_path / "f.npz", image=np.ones((40, 3)), label=labels)
    batch = _batch(f"arrays:{tmp_path}/f.npz", "class", ("image",))
    np.testing.assert_array_equal(batch["label"], labels[batch["index"]])


def test_inputs_that_the_source_lacks_are_named_before_anything_is_read(tmp_path):
    np.savez(tmp_path / "f.npz", image=np.ones((40, 3)))
    with pytest.raises(ValueError, match=r"f\.npz' has no array text"):
        _batch(f"arrays:{tmp_path}/f.npz", "", ("image", "text"))


def test_unknown_kind_of_labels_is_an_error():
    with pytest.raises(ValueError, match="labels='id'"):
        DataConfig(labels="id")


def test_ids_of_64_bits_are_labels_too(tmp_path):
    big = 2**40
    np.savez(
        tmp_path / "f.npz",
        image=np.ones((4, 2), np.float32),
        label=np.array([1, big, big + 1, big]),
    )
    inputs = {"image": FeatureInputs()}
    config = DataConfig(
        train=f"arrays:{tmp_path}/f.npz", labels="class", threads=1, inputs=inputs, shuffle=False
    )
    batches = train_batches(config, ("image",), seed=0, global_batch_size=4)
    labels = next(batches)["label"]
    batches.close()
    assert labels[1] == labels[3]
    assert len(set(labels.tolist())) == 3
    whole = next(iter(eval_batches(batches.source, config, ("image",), batch_size=4)))
    assert whole["label"].tolist() == [1, big, big + 1, big]
