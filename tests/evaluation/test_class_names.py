"""Class lists, mappings, subsets."""

import json

import numpy as np
import pytest

from cwcl_jax.evaluation.class_names import read_class_names, resolve_classes
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot

FOLDERS = ["n01", "n02", "n03"]


def task(**fields) -> ZeroShot:
    return ZeroShot(source="memory:x", **fields)


def test_source_names_are_used_in_label_order():
    classes = resolve_classes(["cat", "dog"], task())
    assert classes.titles == ["cat", "dog"]
    assert classes.of_labels(np.array([1, 0])).tolist() == [1, 0]


def test_list_of_another_length_than_the_classes_is_an_error():
    with pytest.raises(ValueError, match="has 2 names, but the source has 3 classes"):
        resolve_classes(FOLDERS, task(class_names="cat,dog"))


def test_labels_beyond_the_class_list_are_an_error():
    classes = resolve_classes(None, task(class_names="cat,dog"))
    with pytest.raises(ValueError, match="labels run from 0 to 2, but the class list has 2"):
        classes.of_labels(np.array([0, 2]))


def test_duplicates_are_warned_of_and_stay_two_classes():
    classes = resolve_classes(["crane", "boat", "crane"], task())
    assert len(classes.names) == 3
    assert "'crane'" in classes.warnings[0]
    assert "lower index wins" in classes.warnings[0]


def test_empty_name_and_no_names_are_errors():
    with pytest.raises(ValueError, match="class 1 has an empty name"):
        resolve_classes(["cat", " "], task())
    with pytest.raises(ValueError, match="has no class names"):
        resolve_classes(None, task())


def test_mapping_translates_folders_and_joins_synonyms(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n01": ["tench", "fish"], "n02": "hen", "n03": "cat", "n9": "x"}))
    classes = resolve_classes(FOLDERS, task(class_names=str(path)))
    assert classes.names == (("tench", "fish"), ("hen",), ("cat",))


def test_class_that_the_mapping_lacks_is_an_error_or_dropped(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("n01\ttench\nn03\tcat\n")
    with pytest.raises(ValueError, match=r"does not list 1 of the source's 3.*'n02'"):
        resolve_classes(FOLDERS, task(class_names=str(path)))
    classes = resolve_classes(FOLDERS, task(class_names=str(path), unmapped_classes="drop"))
    assert classes.titles == ["tench", "cat"]
    assert classes.source_names == ("n01", "n03")
    assert classes.of_labels(np.array([0, 1, 2])).tolist() == [0, -1, 1]


@pytest.mark.parametrize("lines", ["0\n2\n", "n01\nn03\n", "tench\ncat\n"])
def test_subset_by_index_by_source_name_or_by_prompt_name(tmp_path, lines):
    (tmp_path / "names.txt").write_text("tench\nhen\ncat\n")
    (tmp_path / "subset.txt").write_text(lines)
    classes = resolve_classes(
        FOLDERS,
        task(class_names=str(tmp_path / "names.txt"), class_subset=str(tmp_path / "subset.txt")),
    )
    assert classes.titles == ["tench", "cat"]


def test_subset_with_an_unknown_class_is_an_error(tmp_path):
    (tmp_path / "subset.txt").write_text("n01\nn77\n")
    with pytest.raises(ValueError, match="'n77'"):
        resolve_classes(FOLDERS, task(class_subset=str(tmp_path / "subset.txt")))


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_class_names(str(tmp_path / "absent.txt"))
    (tmp_path / "one.tsv").write_text("n01 tench\n")
    with pytest.raises(ValueError, match="two columns"):
        read_class_names(str(tmp_path / "one.tsv"))
    with pytest.raises(FileNotFoundError, match="class_subset"):
        resolve_classes(FOLDERS, task(class_subset=str(tmp_path / "absent.txt")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'["circle", ', r"a\.json is not JSON"),
        ("a.json", b'{"circle": 1}', r"a\.json: expected a JSON list of names or an object"),
        ("a.json", b'{"circle": [1]}', r"a\.json: expected a JSON list of names or an object"),
        ("a.txt", "Fußball\n".encode("latin-1"), r"a\.txt is not UTF-8"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(str(tmp_path / name))


def test_marks_of_editors_are_no_part_of_a_name(tmp_path):
    (tmp_path / "a.txt").write_text("circle\nsquare\n", encoding="utf-8-sig")
    assert read_class_names(str(tmp_path / "a.txt")) == ["circle", "square"]
    (tmp_path / "a.tsv").write_text("n01\tcircle\n", encoding="utf-8-sig")
    assert read_class_names(str(tmp_path / "a.tsv")) == {"n01": ("circle",)}
    (tmp_path / "a.json").write_text('{"n01": ["circle", "ring"]}', encoding="utf-8-sig")
    assert read_class_names(str(tmp_path / "a.json")) == {"n01": ("circle", "ring")}


def test_the_sources_own_names_in_another_order_are_mapped_by_name(tmp_path):
    """By position a perfect model would be right in one of ten."""
    (tmp_path / "names.txt").write_text("dog\nGreat_Ape\ncat\n")
    names = ["cat", "dog", "great ape"]
    classes = resolve_classes(names, task(class_names=str(tmp_path / "names.txt")))
    assert classes.titles == ["cat", "dog", "Great_Ape"]
    assert classes.warnings == ()


def test_names_of_which_some_are_the_sources_in_another_place_are_refused():
    with pytest.raises(ValueError, match=r"'dog' at another index.*\.tsv"):
        resolve_classes(["cat", "dog", "ape"], task(class_names="dog,tiger,ape"))
    renamed = resolve_classes(["cat", "dog", "ape"], task(class_names="kitten,dog,ape"))
    assert renamed.titles == ["kitten", "dog", "ape"]
    assert "matched by index" in renamed.warnings[0]
    assert "cat = kitten" in renamed.warnings[0]


@pytest.mark.parametrize(
    "names", [["0", "1"], ["n01440764", "n01443537"], ["n01440764 tench", "x"]]
)
def test_names_that_are_no_words_are_warned_of_with_the_remedy(names):
    (warning,) = resolve_classes(names, task()).warnings
    assert "mean nothing in a prompt" in warning
    assert "class_names" in warning
