import pytest

from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.base import require_fields
from tests.data.making import jpeg, write_tar


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


def _picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(jpeg(0))


def test_linked_folders_are_classes_too(tmp_path):
    _picture(tmp_path / "elsewhere" / "deep" / "1.jpg")
    _picture(tmp_path / "d" / "y" / "1.jpg")
    (tmp_path / "d" / "x").symlink_to(tmp_path / "elsewhere")
    source = open_source(f"folder:{tmp_path}/d")
    assert source.class_names == ["x", "y"]
    assert [source[i]["id"] for i in range(2)] == ["x/deep/1.jpg", "y/1.jpg"]


def test_links_that_lead_back_are_not_followed(tmp_path):
    _picture(tmp_path / "y" / "1.jpg")
    (tmp_path / "y" / "all").symlink_to(tmp_path)
    (tmp_path / "y" / "same").symlink_to(tmp_path / "y")
    assert len(open_source(f"folder:{tmp_path}")) == 1


@pytest.mark.parametrize("names", [[str(n) for n in range(12)], ["000", "1", "007"], ["1987", "3"]])
def test_classes_that_are_numbers_are_names_in_their_order(tmp_path, names):
    for name in names:
        _picture(tmp_path / name / "1.jpg")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == sorted(names, key=int)
    found = {e["id"].split("/")[0]: e["label"] for e in (source[i] for i in range(len(source)))}
    assert found == {name: source.class_names.index(name) for name in names}


def test_captions_in_another_encoding_are_no_end(tmp_path):
    for number, text in enumerate([b"\xef\xbb\xbfa cat\n", "un café\n".encode("latin-1")]):
        _picture(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_bytes(text)
    source = open_source(f"folder:{tmp_path}?captions=true")
    assert [source[i]["text"] for i in range(2)] == ["a cat", "un caf\ufffd"]
    with pytest.raises(ValueError, match="has no text; captions=true"):
        require_fields(open_source(f"folder:{tmp_path}"), ("text",), "line")


def test_hidden_folders_and_files_are_no_classes_and_no_items(tmp_path):
    """A notebook's checkpoints and what a Mac leaves beside files."""
    hidden = (
        ".ipynb_checkpoints/0.jpg cat/.ipynb_checkpoints/0.jpg __MACOSX/cat/._0.jpg dog/._1.jpg"
    )
    for name in ["cat/0.jpg", "dog/1.jpg", *hidden.split()]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ["cat", "dog"]
    assert [source.read(i, ())["id"] for i in range(len(source))] == ["cat/0.jpg", "dog/1.jpg"]


def test_hidden_members_and_tars_are_left_out(tmp_path):
    members = [("a.jpg", jpeg(1)), ("x/.ipynb_checkpoints/a.jpg", jpeg(1)), ("._a.jpg", b"no")]
    write_tar(tmp_path / "0.tar", [*members, ("__MACOSX/a.jpg", jpeg(2)), ("./b.jpg", jpeg(3))])
    (tmp_path / "._0.tar").write_bytes(b"Mac")
    source = open_source(f"tars:{tmp_path}")
    assert [source.read(i, ())["id"] for i in range(len(source))] == ["0.tar/a", "0.tar/./b"]


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path, caplog):
    """Links in a circle, to a sibling, to a folder above, and two to one folder elsewhere."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "a", root / "b", elsewhere):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(jpeg(1))
    (root / "a" / "circle").symlink_to(root)
    (root / "b" / "sibling").symlink_to(root / "a")
    (root / "b" / "above").symlink_to(tmp_path)
    (root / "c").symlink_to(elsewhere)
    (root / "d").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "b")
    source = open_source(f"folder:{root}")
    found = sorted(source.read(index, ("image",))["id"] for index in range(len(source)))
    assert len(found) == 3
    assert "5 links to folders that are read anyway are not followed" in caplog.text


def test_a_folder_of_recordings_is_one(tmp_path):
    for name in ("a/1.wav", "b/2.FLAC"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"sound")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ["a", "b"]
    assert [source[i]["audio"] for i in range(2)] == [b"sound"] * 2


def test_recordings_beside_pictures_are_told(tmp_path, caplog):
    _picture(tmp_path / "1.jpg")
    (tmp_path / "1.wav").write_bytes(b"sound")
    assert len(open_source(f"folder:{tmp_path}")) == 1
    assert "its 1 recordings are left out" in caplog.text


def test_a_folder_of_other_files_says_what_it_has(tmp_path):
    for name in ("1.m4a", "2.m4a", "notes"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no recordings.*holds 2 \.m4a, 1 without"):
        open_source(f"folder:{tmp_path}")
