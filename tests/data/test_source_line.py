import pickle
from array import array

import pytest

from cwcl_jax.data.sources import SOURCE_KINDS, Mixture, Subset, open_source
from cwcl_jax.data.sources.base import Source, parse_source_line, require_fields
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import expand_pattern
from tests.data.making import jpeg, write_tar


def test_a_line_is_kind_path_and_options():
    (part,) = parse_source_line("tars:/data/{0..9}.tar?text=json:caption&weight=2")
    assert (part.kind, part.path) == ("tars", "/data/{0..9}.tar")
    assert part.options == {"text": "json:caption", "weight": "2"}


def test_signs_in_values_can_be_escaped():
    (part,) = parse_source_line("csv:/a.csv?text=a%26b%3Fc")
    assert part.options == {"text": "a&b?c"}


def test_a_bare_path_has_the_kind_of_the_part_before_it():
    parts = parse_source_line("tars:/a/{0..1}.tar::/b/0.tar?weight=2::scenes:train")
    assert [part.kind for part in parts] == ["tars", "tars", "scenes"]
    assert parts[1].path == "/b/0.tar"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "without a kind"),
        ("/data/0.tar", "without a kind"),
        ("scense:train", "'scenes'"),
        ("scenes:train?siez=32", "'size'"),
        ("scenes:train?size=big", "of type int"),
        ("scenes:train?size", "has no value"),
        ("scenes:train?weight=0::scenes:train?weight=1", "positive"),
        ("scenes:train?weight=2::scenes:train", "have not"),
        ("slurp:/nowhere?unit=words", "recordings or sentences"),
        ("csv:/x?quoting=maybe", "auto, on or off"),
        ("tars:pipe:cat 0.tar", "is a pipe"),
        ("tars:/x/{5..a}.tar", "two ascending numbers"),
    ],
)
def test_mistakes_are_named_with_their_remedy(line, message):
    with pytest.raises(ValueError, match=message):
        open_source(line)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in SOURCE_KINDS
        if kind not in ("scenes", "commands", "made", "spoken", "tfds", "arrays")
    ],
)
def test_a_missing_path_is_named(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_source(f"{kind}:{tmp_path}/nothing")


def test_patterns_expand_like_a_shell():
    assert expand_pattern("/x/{08..11}.tar") == [f"/x/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_pattern("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_pattern("{9..10}") == ["9", "10"]
    assert expand_pattern("plain") == ["plain"]


def test_globs_are_sorted_and_must_match(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_text("")
    assert expand_pattern(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(FileNotFoundError, match="No file matches"):
        expand_pattern(f"{tmp_path}/*.zip")


def test_a_mixture_is_the_parts_one_after_another():
    mixture = open_source("scenes:train?n=5::scenes:train?n=3&seed=1")
    assert isinstance(mixture, Mixture)
    assert len(mixture) == 8
    parts = [open_source("scenes:train?n=5"), open_source("scenes:train?n=3&seed=1")]
    expected = [part.read(i, ("text",)) for part in parts for i in range(len(part))]
    assert [mixture.read(i, ("text",)) for i in range(8)] == expected
    with pytest.raises(IndexError, match="8 examples"):
        mixture[8]


def test_class_names_survive_a_mixture_of_equal_ones():
    line = "scenes:test?task=shape&n=10"
    assert open_source(f"{line}::{line}&seed=2").class_names is not None
    assert open_source(f"{line}::scenes:test?task=colour&n=10").class_names is None


def test_fingerprints_tell_sources_apart():
    lines = [
        "scenes:train?n=5",
        "scenes:train?n=6",
        "scenes:train?n=5&seed=1",
        "scenes:train?n=5::scenes:train?n=6",
        "scenes:train?n=5&weight=1::scenes:train?n=6&weight=2",
        "scenes:test?task=shape&n=5",
    ]
    prints = [open_source(line).fingerprint() for line in lines]
    assert len(set(prints)) == len(lines)
    assert prints == [open_source(line).fingerprint() for line in lines]


def test_a_subset_renumbers():
    source = open_source("scenes:train?n=20")
    subset = Subset(source, range(5, 9))
    assert len(subset) == 4
    assert subset.read(0, ())["id"] == source.read(5, ())["id"]
    assert subset.fingerprint() != Subset(source, range(5, 10)).fingerprint()
    assert isinstance(subset, Source)


@pytest.mark.parametrize("line", ["scenes:train?n=9", "scenes:train?n=4::scenes:train?n=5"])
def test_sources_can_be_sent_to_another_process(line):
    source = open_source(line)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7, ("text",)) == source.read(7, ("text",))


def test_columns_keep_strings_and_their_absence():
    values = ["a", None, "", "äöü 日本", "x" * 1000]
    column = StringColumn(values)
    assert [column[i] for i in range(5)] == values
    assert len(column) == 5
    assert column.digest_parts() != StringColumn([*values[:-1], "y"]).digest_parts()
    copy = pickle.loads(pickle.dumps(column))
    assert copy[3] == values[3]


def test_many_strings_are_two_blocks_of_memory():
    column = StringColumn(str(number) for number in range(100_000))
    assert column[99_999] == "99999"
    assert isinstance(column._ends, array)
    assert isinstance(column._data, bytearray)


def test_columns_keep_names_that_are_no_utf8_and_lose_what_is_no_text():
    column = StringColumn(["caf\udce9.jpg", "a \ud83d"])
    assert [column[0], column[1]] == ["caf\udce9.jpg", "a ?"]


def test_the_users_folder_is_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    write_tar(tmp_path / "d" / "0.tar", [("0.jpg", jpeg(0)), ("0.cls", b"0")])
    (tmp_path / "b" / "test").mkdir(parents=True)
    write_tar(tmp_path / "b" / "test" / "0.tar", [("0.jpg", jpeg(0)), ("0.cls", b"0")])
    (tmp_path / "b" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "b" / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "p.csv").write_text("filepath,title\n0.jpg,x\n")
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.jpg").write_bytes(jpeg(3))
    assert len(open_source("tars:~/d")) == 1
    assert len(open_source("tars:~/d/0.tar::~/d/{0..0}.tar")) == 2
    assert open_source("clip_benchmark:~/b").class_names == ["cat", "dog"]
    assert open_source("csv:~/p.csv?root=~/img")[0]["image"] == jpeg(3)
    assert len(open_source("spoken:csv:~/p.csv?text=title")) == 1
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "e1")):
        open_source("tars:~/d?features_from=~/e1")


def test_brackets_may_be_part_of_a_folders_name(tmp_path):
    (tmp_path / "[x] y").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "[x] y" / name).write_text("")
    both = [f"{tmp_path}/[x] y/{n}.tar" for n in (0, 1)]
    assert expand_pattern(f"{tmp_path}/[x] y/{{0..1}}.tar") == both
    assert expand_pattern(f"{tmp_path}/[x] y/*.tar") == both
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "7.tar").write_text("")
    assert expand_pattern(f"{tmp_path}/plain/[0-9].tar") == [f"{tmp_path}/plain/7.tar"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "coco", "arrays"])
def test_a_folder_in_place_of_a_file_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match=f"is a folder: {tmp_path}"):
        open_source(f"{kind}:{tmp_path}")


def test_sources_tell_whether_they_have_labels():
    def lacks_labels(line):
        return "label" in open_source(line).lacks

    assert lacks_labels("scenes:train?n=8")
    assert not lacks_labels("scenes:test?task=shape&n=8")
    assert not lacks_labels("scenes:test?task=shape&n=8::scenes:test?task=shape&n=9")
    # The same number would stand for two classes.
    assert lacks_labels("scenes:test?task=shape&n=8::scenes:test?task=colour&n=8")
    assert lacks_labels("scenes:test?task=shape&n=8::scenes:train?n=8")
    source = open_source("scenes:train?n=8")
    assert Subset(source, [1]).lacks == source.lacks
    with pytest.raises(ValueError, match="'line' has no classes; choose"):
        require_fields(source, ("text", "label"), "line")


def test_the_former_name_of_features_from_is_refused_with_todays():
    with pytest.raises(ValueError, match="embeds=/a was renamed to features_from=/a"):
        open_source("scenes:train?embeds=/a")
