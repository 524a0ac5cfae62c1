"""Sets of labels, and features that no tower reads, from files to training batches."""

import json

import numpy as np
import pandas as pd
import pytest

from cwcl_jax.data.label_sets import labels_of, numbered
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.survey import survey_labels
from cwcl_jax.modalities import FeatureInputs

SETS = [["a", "b"], ["b"], [], ["a", "b", "c"], ["[Na+].[Cl-]"], ["b", "a"], ["x y"], ["a"]]
TEXTS = [f"caption {n}" for n in range(len(SETS))]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a; b;;a", ["a", "b"]),
        ("['a', 'b;c']", ["a", "b;c"]),
        ('["a", null, 3]', ["a", "3"]),
        ("[]", []),
        (None, []),
        (float("nan"), []),
        (3.0, ["3"]),
        ([7, 8], ["7", "8"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([["p;q"], "a;b", None], ["p;q", "a", "b"]),
        ("[Na+].[Cl-]", ["[Na+].[Cl-]"]),
    ],
)
def test_cells_hold_labels(value, expected):
    assert labels_of(value, ";") == expected


@pytest.mark.parametrize("printed", ["['a' 'b']", "[1 2 3]", "['a', b c]"])
def test_what_numpy_prints_is_no_list(printed):
    with pytest.raises(BadExample, match="looks like a list but cannot be read as one"):
        labels_of(printed, ";")


def test_equal_labels_have_equal_numbers_and_too_many_are_refused():
    one, two = numbered(["a", "b"], 4), numbered(["b"], 4)
    assert one.dtype == np.int32
    assert one[2:].tolist() == [-1, -1]
    assert one[1] == two[0] != one[0]
    assert one[:2].min() >= 0
    with pytest.raises(BadExample, match=r"has 3, more than config\.data\.max_labels=2"):
        numbered(["a", "b", "c"], 2, "row 7")


def _write(folder, kind):
    """A file of the kind, written by other libraries; its source line without the options."""
    frame = pd.DataFrame({"text": TEXTS, "genes": SETS})
    vectors = np.arange(1, 1 + 2 * len(SETS), dtype=np.float32).reshape(-1, 2)
    match kind:
        case "csv of joined strings":
            frame["genes"] = frame["genes"].str.join(";")
            frame.to_csv(folder / "t.csv", index=False)
            return f"csv:{folder}/t.csv?"
        case "csv of lists":
            frame.to_csv(folder / "t.csv", index=False)
            return f"csv:{folder}/t.csv?"
        case "jsonl":
            frame.to_json(folder / "t.jsonl", orient="records", lines=True)
            return f"jsonl:{folder}/t.jsonl?"
        case "parquet":
            frame.to_parquet(folder / "t.parquet")
            return f"parquet:{folder}/t.parquet?"
        case "arrays":
            joined = np.array([";".join(labels) for labels in SETS])
            np.savez(folder / "t.npz", text=np.array(TEXTS), genes=joined, image=vectors)
            return f"arrays:{folder}/t.npz?features=image&"
    raise AssertionError(kind)


KINDS = ["csv of joined strings", "csv of lists", "jsonl", "parquet", "arrays"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_sets_comes_out_of_every_kind_of_table(tmp_path, kind):
    line = _write(tmp_path, kind)
    plain, source = open_source(line + "text=text"), open_source(line + "text=text&labels=genes")
    assert source.fingerprint() != plain.fingerprint() or kind == "arrays"
    for index, expected in enumerate(SETS):
        example = source.read(index, ("labels", "text"))
        assert labels_of(example["labels"], ";") == expected, index
        assert example["text"] == TEXTS[index]
        assert "labels" not in source.read(index, ("text",))
    with pytest.raises(ValueError, match="'gene'"):
        open_source(line + "text=text&labels=gene")


@pytest.mark.parametrize("kind", ["csv of lists", "jsonl", "parquet"])
def test_several_columns_are_one_set(tmp_path, kind):
    source = open_source(_write(tmp_path, kind) + "text=text&labels=text,genes")
    found = labels_of(source.read(0, ("labels",))["labels"], ";")
    assert found == ["caption 0", "a", "b"]
    assert source.taken["labels"] == "text and genes"


def test_the_survey_tells_how_labels_were_read(tmp_path):
    source = open_source(_write(tmp_path, "csv of joined strings") + "labels=genes")
    told = str(survey_labels(source, ";"))
    assert "1.4 labels per example in a sample of 8, 5 different ones, 1 examples without" in told
    assert "for example: a | b | c" in told
    assert survey_labels(open_source("scenes:train?n=4"), ";").kinds == 0


def batches_of(line, **options):
    config = DataConfig(
        train=line, threads=1, shuffle=False, inputs={"image": FeatureInputs()}, **options
    )
    return train_batches(config, ("image",), seed=0, global_batch_size=8)


def test_batches_hold_rows_of_labels_and_the_guide(tmp_path):
    line = _write(tmp_path, "arrays") + "labels=genes"
    guide = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
    np.save(tmp_path / "profiles.npy", guide)
    line += f"&features_from=profile:{tmp_path}/profiles.npy"
    with_sets = batches_of(line, labels="sets", max_labels=4, guide="profile")
    fast = batches_of(line, guide="profile")
    batch, vectors = next(with_sets), next(fast)
    with_sets.close()
    fast.close()
    assert batch["label"].shape == (8, 4)
    np.testing.assert_array_equal((batch["label"] >= 0).sum(axis=1), [len(s) for s in SETS])
    assert set(batch["label"][0]) == set(batch["label"][5])
    for made in (batch, vectors):
        np.testing.assert_array_equal(made["guide"], guide)
        np.testing.assert_array_equal(made["image"]["features"][0], [1, 2])
    assert with_sets.fingerprint()["guide"] == "profile"
    np.save(tmp_path / "profiles.npy", guide + 1)
    assert batches_of(line, guide="profile").fingerprint() != fast.fingerprint()


def test_an_example_with_too_many_labels_is_unusable(tmp_path):
    batches = batches_of(_write(tmp_path, "arrays") + "labels=genes", labels="sets", max_labels=2)
    batch = next(batches)
    batches.close()
    assert dict(batches.skipped) == {"too many labels": 1}
    assert 3 not in batch["index"]


def test_a_guide_that_the_source_lacks_is_refused(tmp_path):
    line = _write(tmp_path, "arrays")
    with pytest.raises(ValueError, match=r"has no features 'profile', which data.guide names"):
        batches_of(line, guide="profile")


def test_a_file_beside_must_have_a_row_for_every_example(tmp_path):
    line = _write(tmp_path, "csv of lists")
    np.save(tmp_path / "short.npy", np.ones((7, 2), np.float32))
    np.savez(tmp_path / "moved.npz", x=np.ones((8, 2)), ids=[f"row {n}" for n in range(1, 9)])
    np.savez(tmp_path / "two.npz", x=np.ones((8, 2)), y=np.ones((8, 2)))
    np.save(tmp_path / "flat.npy", np.ones(8, np.float32))
    for file, message in (
        ("short.npy", "has 7 rows, the source 8"),
        ("two.npz", "none of which is called 'guide'"),
        ("flat.npy", r"numbers of shape \(examples, width\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"{line}features_from=guide:{tmp_path}/{file}")
    moved = open_source(f"{line}features_from=guide:{tmp_path}/moved.npz")
    with pytest.raises(ValueError, match=r"Row 0 of .* belongs to 'row 1'"):
        moved.read(0, ("features",))


def test_json_lists_of_lists_are_read_as_they_are(tmp_path):
    rows = [{"text": "t", "labels": [3, 4]}, {"text": "u", "labels": 5}, {"text": "v"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"jsonl:{tmp_path}/t.jsonl?labels=labels")
    found = [labels_of(source.read(i, ("labels",))["labels"], ";") for i in range(3)]
    assert found == [["3", "4"], ["5"], []]
