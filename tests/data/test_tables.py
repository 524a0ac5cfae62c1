import csv
import json
import os
import tracemalloc

import numpy as np
import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.base import columns_taken, require_fields
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


def test_fingerprints_follow_the_text(pictures):
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/0.jpg\tx\n")
    first = open_source(f"tsv:{pictures}/p.tsv").fingerprint()
    (pictures / "p.tsv").write_text("filepath\ttitle\nimg/0.jpg\ty\n")
    assert open_source(f"tsv:{pictures}/p.tsv").fingerprint() != first


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("filepath,title\na.jpg,x\nb.jpg,a cat, sitting\n", "line 3 has more cells"),
        (
            "filepath,title\na.jpg,x\n" + 'b.jpg,"open\n' + "c.jpg,y\n" * 50,
            "starts in line 3: unexp",
        ),
        ('filepath,title\na.jpg,"a "big" cat"\n', r"starts in line 2: .* quoting=off"),
    ],
)
def test_rows_that_would_lose_text_are_an_error_with_their_line(tmp_path, table, message):
    (tmp_path / "p.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        open_source(f"csv:{tmp_path}/p.csv")


def test_empty_cells_behind_the_last_column_are_no_loss(tmp_path):
    (tmp_path / "p.csv").write_text("filepath,title\na.jpg,x,,\nb.jpg,y\n")
    assert open_source(f"csv:{tmp_path}/p.csv").read(0, ("text",))["text"] == "x"


def test_null_is_no_caption_and_any_text_can_be_tokenized(tmp_path):
    rows = [
        r'{"image": "a.jpg", "text": ["a cat", null, "\ud83d"]}',
        r'{"image": "\ud83d.jpg", "text": "\udce9 a \ud83d"}',
        r'{"image": "c.jpg", "text": null}',
        r'{"image": "c.jpg", "text": "\ufeffa cat"}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    source = open_source(f"jsonl:{tmp_path}/m.jsonl")
    texts = [source.read(i, ("text",)).get("text") for i in range(4)]
    assert texts == [["a cat", "?"], "? a ?", None, "a cat"]
    with pytest.raises(BadExample, match="file missing"):
        source[1]


def test_an_empty_label_is_no_class(tmp_path):
    labels = ["0", "1", "", "10", " 2 "]
    (tmp_path / "l.csv").write_text("filepath,label\n" + "".join(f"i.jpg,{v}\n" for v in labels))
    source = open_source(f"csv:{tmp_path}/l.csv")
    assert source.class_names is None
    read = [source.read(i, ("label",)).get("label") for i in range(5)]
    assert read == [0, 1, None, 10, 2]
    assert "label" not in source.lacks
    (tmp_path / "l.csv").write_text("filepath,label\ni.jpg,dog\ni.jpg,\ni.jpg,cat\n")
    source = open_source(f"csv:{tmp_path}/l.csv")
    assert source.class_names == ["cat", "dog"]
    assert [source.read(i, ("label",)).get("label") for i in range(3)] == [1, None, 0]


@pytest.mark.parametrize("sep", ["tab", r"\t", "%7C", "semicolon"])
def test_separators_have_names(tmp_path, sep):
    sign = {"%7C": "|", "semicolon": ";"}.get(sep, "\t")
    (tmp_path / "p.txt").write_text(f"filepath{sign}title\na.jpg{sign}x, y\n")
    source = open_source(f"csv:{tmp_path}/p.txt?sep={sep}")
    assert source.read(0, ("text",))["text"] == "x, y"


def test_other_separators_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("filepath||title\n")
    with pytest.raises(ValueError, match=r"sep='\|\|' .* semicolon or one character"):
        open_source(f"csv:{tmp_path}/p.txt?sep=||")


def test_usual_columns_are_found_in_any_case(tmp_path):
    (tmp_path / "p.csv").write_text("URL,TEXT,Filepath\nu,yes,a.jpg\n")
    source = open_source(f"csv:{tmp_path}/p.csv")
    assert source.read(0, ("text",)) == {"id": "a.jpg", "text": "yes"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_name_their_columns_where_a_field_is_missing(tmp_path, kind):
    rows = {"csv": "filepath,KAPTION\na.jpg,x\n", "jsonl": '{"filepath": "a", "KAPTION": "x"}'}
    (tmp_path / "p").write_text(rows[kind])
    source = open_source(f"{kind}:{tmp_path}/p")
    with pytest.raises(ValueError, match=r"has no text; .* text= .*\(it has filepath, KAPTION\)"):
        require_fields(source, ("image", "text"), "line")
    require_fields(source, ("image", "features"), "line")
    assert set(source.lacks) == {"text", "audio", "label"}


def test_lengths_of_recordings_are_known_where_a_manifest_lists_them(tmp_path):
    rows = [{"audio": "a.wav", "duration": 1.5}, {"audio": "b.wav"}, {"audio": "c", "duration": 4}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = open_source(f"jsonl:{tmp_path}/m.jsonl")
    assert list(manifest.durations) == [1.5, np.inf, 4.0]  # of any length
    (tmp_path / "m.csv").write_text("wav,s,bad\na.wav,1.5,one\nb.wav,nan,\nc.wav,4,-2\n")
    table = open_source(f"csv:{tmp_path}/m.csv?duration=s")
    assert list(table.durations) == [1.5, np.inf, 4.0]
    assert open_source(f"csv:{tmp_path}/m.csv").durations is None
    assert open_source(f"csv:{tmp_path}/m.csv?duration=bad").durations is None
    # Batches of recordings of like lengths are others where the lengths are.
    assert table.fingerprint() != open_source(f"csv:{tmp_path}/m.csv").fingerprint()
    (tmp_path / "v.jsonl").write_text('{"image": "clip.png", "duration": 3}')
    assert open_source(f"jsonl:{tmp_path}/v.jsonl").durations is None


def test_manifests_are_read_row_by_row(tmp_path):
    row = {"image": "i.jpg", "text": "a caption", "more": "x" * 1300}
    rows = [json.dumps(row | {"number": number}) for number in range(8000)]
    (tmp_path / "m.jsonl").write_text("\n".join([*rows, '{"image": "last.jpg"}']))
    tracemalloc.start()
    source = open_source(f"jsonl:{tmp_path}/m.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(source), source.read(8000, ())["id"]) == (8001, "last.jpg")
    # The file has 11 MB; the first thousand rows are looked at for their columns.
    assert peak < 4e6


def test_durations_of_zero_are_no_durations(tmp_path, caplog):
    """torchaudio.info of an MP3 gave 0 frames, and manifests say so."""

    def opened(*seconds):
        rows = [{"audio": f"{i}.mp3", "duration": s} for i, s in enumerate(seconds)]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_source(f"jsonl:{tmp_path}/m.jsonl")

    with pytest.raises(ValueError, match="duration is 0 in 2 of 3 rows"):
        opened(0, 0.0, 1)
    assert list(opened(0, 2, 1).durations) == [np.inf, 2.0, 1.0]
    assert "0 in 1 of 3 rows" in caplog.text


def test_equal_tables_of_other_files_have_other_fingerprints(tmp_path):
    """`folder:train` and `folder:test` whose files are numbered alike are not one data set."""

    def written(name, seed):
        (tmp_path / name / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "cat" / "0.jpg").write_bytes(jpeg(seed))
        return open_source(f"folder:{tmp_path}/{name}").fingerprint()

    assert written("train", 1) != written("test", 2)
    assert written("train", 1) == written("copy", 1)
    assert written("train", 1) != written("train", 3)  # changed after the fact


CAPTIONS = [
    "a plain cat",
    'a sign that says "STOP"',
    "two lines\nof one caption",
    'the "best" dog',
    'a 5" nail',
]


def test_a_table_with_tabs_that_pandas_wrote_is_not_read_as_text(tmp_path):
    file = tmp_path / "p.tsv"
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened, delimiter="\t", lineterminator="\n")
        writer.writerow(("filepath", "title"))
        writer.writerows((f"{i}.png", caption) for i, caption in enumerate(CAPTIONS))
    with pytest.raises(ValueError, match="quoting=on if these enclose fields"):
        open_source(f"csv:{file}")
    table = open_source(f"csv:{file}?quoting=on")
    assert [table.read(i, ("text",))["text"] for i in range(len(table))] == CAPTIONS
    file.write_text('filepath\ttitle\n0.png\t"STOP" says a sign\n1.png\ta 5" nail\n')
    assert open_source(f"csv:{file}").read(0, ("text",))["text"] == '"STOP" says a sign'


def test_two_columns_that_may_be_the_text_are_told_where_it_is_needed(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,title,text\na.png,The page,A cat on a mat\n")
    source = open_source(f"csv:{tmp_path}/t.csv")
    with pytest.raises(
        ValueError, match=r"2 columns that could be the text \(title, text\); .*text="
    ):
        require_fields(source, ("image", "text"), "line")
    chosen = open_source(f"csv:{tmp_path}/t.csv?text=text")
    require_fields(chosen, ("image", "text"), "line")
    assert columns_taken(chosen) == ["image from filepath, text from text"]
    assert chosen.read(0, ("text",))["text"] == "A cat on a mat"


def test_a_column_of_files_is_what_the_files_are(tmp_path):
    """The metadata.csv of an audio folder calls its recordings `file_name`, as one of pictures."""
    (tmp_path / "metadata.csv").write_text("file_name,transcription\na.wav,hello\n")
    source = open_source(f"csv:{tmp_path}/metadata.csv?text=transcription")
    assert set(source.columns) == {"audio", "text"}
    (tmp_path / "m.jsonl").write_text('{"path": "a.jpg", "text": "a cat"}\n')
    assert set(open_source(f"jsonl:{tmp_path}/m.jsonl").columns) == {"image", "text"}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_no_examples_and_no_tables(tmp_path, make):
    """Opening a pipe waits for ever; a device never ends."""
    make(tmp_path / "1.jpg")
    (tmp_path / "table.csv").write_text("filepath,caption\n1.jpg,a cat\n")
    source = open_source(f"csv:{tmp_path / 'table.csv'}")
    with pytest.raises(BadExample, match="no regular file"):
        source.read(0, ("image",))
    make(tmp_path / "odd.csv")
    with pytest.raises(ValueError, match="not a regular file"):
        open_source(f"csv:{tmp_path / 'odd.csv'}")


def test_a_line_that_is_nested_too_deeply_is_skipped(tmp_path, caplog):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{deep}\n{{"image": "1.jpg", "text": "a cat"}}\n')
    source = open_source(f"jsonl:{tmp_path / 'a.jsonl'}")
    assert "line 1 is not a JSON object" in caplog.text
    assert source.read(1, ("text",))["text"] == "a cat"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1" + bytes(20), "is a Parquet file: write parquet:"),
        (b"\x1f\x8b\x08", "compressed"),
        ("path,text\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_of_another_kind_is_named(tmp_path, kind, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(f"{kind}:{tmp_path}/data")


@pytest.mark.parametrize(
    ("text", "words"), [("file;words\na;b\n", "add sep=semicolon"), ("", "It is empty")]
)
def test_a_wrong_separator_and_an_empty_table_are_told(text, words, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    for options in ("", "?text=words"):
        with pytest.raises(ValueError, match=words):
            open_source(f"csv:{tmp_path}/t.csv{options}")
