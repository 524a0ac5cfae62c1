"""Examples that are trained on and evaluated on."""

import json

import pytest

from cwcl_jax.data.overlap import shared_examples
from cwcl_jax.data.sources import check_training_line, open_source
from tests.data.making import jpeg


def table(folder, name, files):
    for file, seed in files:
        (folder / file).write_bytes(jpeg(seed))
    rows = "".join(json.dumps({"image": file, "text": "a"}) + "\n" for file, _ in files)
    (folder / name).write_text(rows)
    return open_source(f"jsonl:{folder / name}")


def test_the_same_examples_in_another_table_are_found(tmp_path):
    train = table(tmp_path, "train.jsonl", [("a.jpg", 1), ("b.jpg", 2)])
    shared = table(tmp_path, "test.jsonl", [("c.jpg", 3), ("b.jpg", 2)])
    assert shared_examples(train, shared, {"image"}).endswith("such as b.jpg")
    (tmp_path / "other").mkdir()
    other = table(tmp_path / "other", "test.jsonl", [("a.jpg", 5), ("b.jpg", 6)])
    assert shared_examples(train, other, {"image"}) == ""  # equal names of other pictures
    assert "the training data" in shared_examples(train, train, {"image"})


def test_parts_of_a_mixture_are_compared():
    mixture = open_source("scenes:train?n=20::scenes:test?task=shape&n=10")
    assert shared_examples(mixture, open_source("scenes:test?task=shape&n=10"), {"image"})
    assert not shared_examples(mixture, open_source("scenes:test?task=colour&n=10"), {"image"})


@pytest.mark.parametrize("line", ["slurp:/x", "scenes:train::stop:/x", "spoken:slurp:/x?voices=a"])
def test_a_split_that_would_be_the_test_data_must_be_said(line):
    with pytest.raises(ValueError, match="without split= is the split test"):
        check_training_line(line)
    check_training_line(line + ("&" if "?" in line else "?") + "split=train")
