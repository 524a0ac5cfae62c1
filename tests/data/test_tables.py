import json

import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from tests.data.making import jpeg


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "img").mkdir()
    for number in range(3):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path


def test_tabs_and_the_usual_columns_are_the_default(pictures):
    table = 'id\tfilepath\ttitle\n7\timg/0.jpg\ta "lone quote\n8\timg/1.jpg\tsecond\n'
    (pictures / "pairs.csv").write_text(table)
    source = open_source(f"csv:{pictures}/pairs.csv")
    assert len(source) == 2
    assert source[0] == {"id": "img/0.jpg", "image": jpeg(0), "text": 'a "lone quote'}


def test_commas_quotes_and_line_breaks_inside_fields(pictures):
    table = '\ufefffilepath,title\nimg/0.jpg,"one, ""two""\nthree"\nimg/2.jpg,four\n'
    (pictures / "pairs.csv").write_text(table, encoding="utf-8")
    source = open_source(f"csv:{pictures}/pairs.csv")
    assert [source[i]["text"] for i in range(2)] == ['one, "two"\nthree', "four"]


def test_columns_separator_and_root_can_be_named(pictures):
    (pictures / "lists").mkdir()
    (pictures / "lists" / "p.txt").write_text("file;words;kind\n1.jpg;hello;cat\n0.jpg;bye;ant\n")
    line = f"csv:{pictures}/lists/p.txt?image=file&text=words&label=kind&sep=semicolon"
    source = open_source(f"{line}&root={pictures}/img")
    assert source[0] == {"id": "1.jpg", "image": jpeg(1), "text": "hello", "label": 1}
    assert source.class_names == ["ant", "cat"]


def test_absolute_paths_are_kept(pictures, tmp_path):
    (tmp_path / "abs.tsv").write_text(f"filepath\ttitle\n{pictures}/img/2.jpg\tx\n")
    assert open_source(f"tsv:{tmp_path}/abs.tsv")[0]["image"] == jpeg(2)


def test_a_wrong_column_names_the_nearest(pictures):
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/0.jpg\tx\n")
    with pytest.raises(ValueError, match=r"'filepath'.*filepath, title"):
        open_source(f"tsv:{pictures}/p.tsv?image=filpath")
    (pictures / "q.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="image=, text="):
        open_source(f"tsv:{pictures}/q.tsv")


def test_missing_files_and_cells_are_bad_examples_or_missing_fields(pictures):
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/9.jpg\tx\nimg/0.jpg\n")
    source = open_source(f"tsv:{pictures}/p.tsv")
    with pytest.raises(BadExample, match="file missing"):
        source[0]
    assert "text" not in source[1]
    # Who only wants captions does not touch the picture.
    assert source.read(0, ("text",))["text"] == "x"


def test_jsonl_manifests_with_several_captions_and_broken_lines(pictures, caplog):
    rows = [
        json.dumps({"image": "img/0.jpg", "captions": ["one", "two [x]"], "label": 3}),
        "",
        "{broken",
        json.dumps(["no", "object"]),
        json.dumps({"image": "img/1.jpg", "captions": "only", "label": 5}),
    ]
    (pictures / "m.jsonl").write_text("\n".join(rows))
    source = open_source(f"jsonl:{pictures}/m.jsonl")
    assert len(source) == 4
    assert source[0]["text"] == ["one", "two [x]"]
    assert [source[i].get("label") for i in range(4)] == [3, None, None, 5]
    assert "image" not in source[1]
    assert source.class_names is None
    assert "line 3" in caplog.text


def test_folders_of_classes(tmp_path):
    for name, number in (("b/1.JPG", 1), ("a/2.jpeg", 2), ("a/deep/3.jpg", 3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(number))
    (tmp_path / "a" / "2.txt").write_text("first\n\nsecond\n")
    (tmp_path / "a" / "notes.md").write_text("no picture")
    source = open_source(f"folder:{tmp_path}?captions=true")
    assert source.class_names == ["a", "b"]
    by_id = {source[i]["id"]: source[i] for i in range(len(source))}
    assert {name: e["label"] for name, e in by_id.items()} == {
        "a/2.jpeg": 0,
        "a/deep/3.jpg": 0,
        "b/1.JPG": 1,
    }
    assert by_id["a/2.jpeg"]["text"] == ["first", "second"]
    assert by_id["b/1.JPG"]["image"] == jpeg(1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        open_source(f"folder:{tmp_path}/empty")


def test_fingerprints_follow_the_text(pictures):
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/0.jpg\tx\n")
    first = open_source(f"tsv:{pictures}/p.tsv").fingerprint()
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/0.jpg\ty\n")
    assert open_source(f"tsv:{pictures}/p.tsv").fingerprint() != first
