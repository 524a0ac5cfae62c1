import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources import tar_index as tar_index_module
from cwcl_jax.data.sources.base import require_fields
from cwcl_jax.data.sources.tar_index import build_index, load_index
from cwcl_jax.data.sources.tars import Tars
from tests.data.making import jpeg, pairs, write_tar


def _expected(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}


def _read_back(path) -> dict[str, bytes]:
    index, data = build_index(str(path)), path.read_bytes()
    found = {}
    for row, key in enumerate(index.table["key"]):
        for part in tar_index_module.PARTS:
            place = index.place(row, part)
            if place is not None:
                found[key.decode(), part] = data[place[0] : place[0] + place[1]]
    return found


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, 0])
@pytest.mark.parametrize("folder", ["", "part/", "long" * 30 + "/" + "x" * 90 + "/"])
def test_the_index_finds_what_tarfile_finds(tmp_path, tar_format, folder):
    if tar_format == tarfile.USTAR_FORMAT and len(folder) > 200:
        pytest.skip("plain ustar has no room for such names")
    members = [(folder + name, data) for name, data in pairs(7)]
    members.append((f"{folder}ünïcode.jpg", b"picture"))
    path = tmp_path / "a.tar"
    write_tar(path, members, tar_format)
    found = _read_back(path)
    kinds = {"jpg": "image", "txt": "text", "json": "json"}
    expected = {
        (name.rsplit(".", 1)[0], kinds[name.rsplit(".", 1)[1]]): data
        for name, data in _expected(path).items()
    }
    assert found == expected


def test_a_window_border_may_fall_anywhere(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_tar(path, pairs(20))
    whole, checksum = _read_back(path), build_index(str(path)).checksum
    for window in (512, 1024, 5000, 1 << 14):
        monkeypatch.setattr(tar_index_module, "_WINDOW", window)
        assert _read_back(path) == whole
        # A member of words that is larger than the window counts by its end alone.
        if window >= 1024:
            assert build_index(str(path)).checksum == checksum


def test_folders_and_links_are_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"odd-{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert _read_back(path) == {("real", "image"): b"abc"}


def test_samples_come_with_picture_caption_and_id(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", pairs(4, first=4 * shard))
    source = open_source(f"tars:{tmp_path}/{{00000..00002}}.tar")
    assert len(source) == 12
    example = source[9]
    assert example["id"] == "00002.tar/000000009"
    assert example["text"] == "caption 9"
    assert example["image"] == jpeg(9)
    assert len(open_source(f"tars:{tmp_path}")) == 12


@pytest.mark.filterwarnings("ignore")
def test_samples_are_those_that_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", pairs(5, first=5 * shard))
    paths = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    dataset = webdataset.WebDataset(paths, shardshuffle=False).to_tuple("__key__", "jpg", "txt")
    expected = [(key, image, text.decode()) for key, image, text in dataset]
    source = open_source(f"tars:{tmp_path}/{{0..1}}.tar")
    ours = [source[i] for i in range(len(source))]
    assert [(e["id"].split("/")[1], e["image"], e["text"]) for e in ours] == expected


def test_captions_can_come_from_a_json_field(tmp_path):
    many = b'{"caption": ["one", "two"], "none": null}'
    write_tar(tmp_path / "0.tar", [*pairs(1), ("x.jpg", b"x"), ("x.json", many)])
    source = open_source(f"tars:{tmp_path}/0.tar?text=json:caption")
    assert source.read(0, ("text",))["text"] == "field 0"
    assert source.read(1, ("text",))["text"] == ["one", "two"]
    none = open_source(f"tars:{tmp_path}/0.tar?text=json:none")
    assert "text" not in none.read(1, ("text",))


def test_missing_members_are_missing_fields(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.txt", b"words"), ("c.json", b"no json")])
    source = open_source(f"tars:{tmp_path}/0.tar")
    assert set(source[0]) == {"id", "image"}
    assert set(source[1]) == {"id", "text"}
    broken = open_source(f"tars:{tmp_path}/0.tar?text=json:caption")
    with pytest.raises(BadExample, match="json unreadable"):
        broken[2]


def test_a_truncated_tar_loses_its_last_samples_only(tmp_path, caplog):
    path = tmp_path / "0.tar"
    write_tar(path, pairs(10))
    whole = len(build_index(str(path)))
    data = path.read_bytes()
    for keep in (len(data) // 2, len(data) // 2 // 512 * 512, 700):
        path.write_bytes(data[:keep])
        index = build_index(str(path))
        assert index.truncated
        assert len(index) < whole
        for _ in range(2):  # Also when the index is only read.
            caplog.clear()
            source = Tars([str(path)])
            assert (
                f"truncated, their last samples are lost; first {path} ({len(source)} remain)"
                in caplog.text
            )
        for row in range(len(index)):
            places = [index.place(row, part) for part in ("image", "text", "json")]
            assert all(sum(place) <= keep for place in places if place is not None)


def test_a_tar_that_shrinks_after_it_was_indexed_is_skipped_not_fatal(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, pairs(5))
    source = open_source(f"tars:{path}")
    os.truncate(path, 2000)
    with pytest.raises(BadExample, match="truncated"):
        source[4]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_headers_end_the_scan_and_nothing_else(tmp_path, tar_format):
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{'long' * 40}{name}", data) for name, data in pairs(4)], tar_format)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(512, len(data), 40):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        index = build_index(str(path))
        for row in range(len(index)):
            places = [index.place(row, part) for part in ("image", "text", "json")]
            assert all(sum(place) <= len(data) for place in places if place is not None)


@pytest.mark.parametrize(
    "body", [b"0 path=x\n", b"1 \n", b"words", b"12 size=-5\n\n", b"9999 path=x\n"]
)
def test_damaged_extended_headers_do_not_hang(tmp_path, body):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("extended")
        info.type, info.size = tarfile.XHDTYPE, len(body)
        tar.addfile(info, io.BytesIO(body))
        real = tarfile.TarInfo("real.jpg")
        real.size = 3
        tar.addfile(real, io.BytesIO(b"abc"))
    assert len(build_index(str(tmp_path / "0.tar"))) <= 1


def test_long_scans_tell_how_far_they_are(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cwcl_jax.data.sources.tars._SECONDS_BETWEEN_NEWS", -1)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(1))
    open_source(f"tars:{tmp_path}")
    assert "3 of 3" in caplog.text


def test_names_that_point_outside_are_only_names(tmp_path):
    outside = tmp_path / "outside.jpg"
    members = [(f"../{outside.name}", b"evil"), (str(outside) + "x.jpg", b"evil")]
    write_tar(tmp_path / "0.tar", [*members, *pairs(1)])
    source = open_source(f"tars:{tmp_path}/0.tar")
    before = sorted(tmp_path.rglob("*"))
    for index in range(len(source)):
        source[index]
    assert sorted(tmp_path.rglob("*")) == before
    assert not outside.exists()


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    write_tar(path, pairs(3))
    assert len(load_index(str(path))) == 3
    kept = tmp_path / "0.tar.offsets"
    assert kept.exists()

    def refuse(path):
        raise AssertionError(f"{path} was scanned again")

    with monkeypatch.context() as patched:
        patched.setattr(tar_index_module, "build_index", refuse)
        assert len(load_index(str(path))) == 3
    write_tar(path, pairs(5))
    assert len(load_index(str(path))) == 5
    good = kept.read_bytes()
    for broken in (b"half a file", b"", good[:-3], good[:40], b"{}\n"):
        kept.write_bytes(broken)
        assert len(load_index(str(path))) == 5


def test_a_tar_without_samples_has_an_index_too(tmp_path):
    write_tar(tmp_path / "0.tar", [("readme", b"nothing")])
    write_tar(tmp_path / "1.tar", pairs(2))
    for _ in range(2):
        assert len(load_index(str(tmp_path / "0.tar"))) == 0
        assert len(open_source(f"tars:{tmp_path}")) == 2
    with pytest.raises(ValueError, match="no examples"):
        open_source(f"tars:{tmp_path}/0.tar")


def test_same_size_and_another_time_is_another_tar(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, [("a.txt", b"one"), ("b.txt", b"two")])
    load_index(str(path))
    size = path.stat().st_size
    write_tar(path, [("c.txt", b"one"), ("d.txt", b"two")])
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size
    assert load_index(str(path)).table["key"].tolist() == [b"c", b"d"]


def test_indexes_go_to_the_cache_folder_when_one_is_named(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    write_tar(data / "0.tar", pairs(2))
    source = open_source(f"tars:{data}/0.tar", cache_dir=str(cache))
    assert len(source) == 2
    assert [p.name for p in data.iterdir()] == ["0.tar"]
    assert len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "0.tar", pairs(2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    original = tar_index_module._write

    def write(place, index):
        if data in place.parents:
            raise PermissionError(place)
        original(place, index)

    monkeypatch.setattr(tar_index_module, "_write", write)
    assert len(load_index(str(data / "0.tar"))) == 2
    assert list((tmp_path / "home").rglob("*.offsets"))


def test_a_file_that_is_no_tar_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + b"zipped" * 200)
    with pytest.raises(ValueError, match="decompressed"):
        open_source(f"tars:{tmp_path}/0.tar")


def test_missing_tars_are_counted_and_named(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(1))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 tars .*1\.tar"):
        open_source(f"tars:{tmp_path}/{{0..2}}.tar")


def test_the_fingerprint_does_not_change_with_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "one" / "0.tar", pairs(2))
    shutil.copy(tmp_path / "one" / "0.tar", tmp_path / "two" / "0.tar")
    prints = [open_source(f"tars:{tmp_path}/{n}/0.tar").fingerprint() for n in ("one", "two")]
    assert prints[0] == prints[1]
    write_tar(tmp_path / "two" / "0.tar", pairs(3))
    assert open_source(f"tars:{tmp_path}/two/0.tar").fingerprint() != prints[0]


CHANGES = {
    "caption": ("00000.txt", b"a red circle", b"a tan circle"),
    "field": ("00000.json", b'{"caption": "' + b"x" * 2000, b'{"caption": "' + b"y" * 2000),
    "label": ("00000.cls", b"1", b"2"),
    "samples of a recording": ("00000.wav", bytes(2000), bytes(1999) + b"1"),
    "name": ("00000.jpg", b"data", b"data"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_tells_tars_of_one_size_apart(tmp_path, change):
    name, before, after = CHANGES[change]
    prints = []
    for data in (before, after, before):
        renamed = "00001.jpg" if change == "name" and len(prints) == 1 else name
        write_tar(tmp_path / "0.tar", [("x.jpg", jpeg(1)), (renamed, data), ("y.jpg", jpeg(2))])
        os.utime(tmp_path / "0.tar", ns=(1, 1 + len(prints)))
        prints.append(open_source(f"tars:{tmp_path}/0.tar").fingerprint())
    assert prints[0] != prints[1]
    assert prints[0] == prints[2]


def test_the_fingerprint_follows_the_times_of_the_members(tmp_path):
    prints = []
    for time in (1, 2):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            info = tarfile.TarInfo("0.jpg")
            info.size, info.mtime = 2000, time
            tar.addfile(info, io.BytesIO(bytes(2000)))
        os.utime(tmp_path / "0.tar", ns=(1, time))
        prints.append(open_source(f"tars:{tmp_path}/0.tar").fingerprint())
    assert prints[0] != prints[1]


def test_the_scan_reads_no_pictures(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", bytes(3_000_000)) for i in range(5)])
    read, original = [], os.pread

    def pread(descriptor, size, offset):
        read.append(len(data := original(descriptor, size, offset)))
        return data

    monkeypatch.setattr(tar_index_module.os, "pread", pread)
    build_index(str(tmp_path / "0.tar"))
    # One piece beside each header, and the first.
    assert len(read) <= 6
    assert sum(read) <= 6 * (1 << 19)


def test_an_index_of_the_first_version_is_made_again(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, pairs(2))
    expected = load_index(str(path)).checksum
    kept = tmp_path / "0.tar.offsets"
    header, table = kept.read_bytes().split(b"\n", 1)
    old = {key: value for key, value in json.loads(header).items() if "surplus" not in key}
    del old["checksum"]
    kept.write_bytes(json.dumps(old | {"version": 1}).encode() + b"\n" + table)
    index = load_index(str(path))
    assert (len(index), index.checksum) == (2, expected)
    assert json.loads(kept.read_bytes().split(b"\n", 1)[0])["version"] == 3


def test_more_tars_than_open_files(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        write_tar(tmp_path / f"{number:05d}.tar", [("a.txt", str(number).encode())])
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 280), hard))
    try:
        source = open_source(f"tars:{tmp_path}/{{00000..00299}}.tar")
        texts = [source[i]["text"] for i in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert texts == [str(number) for number in range(300)]


def test_tars_can_be_sent_to_another_process(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(2))
    source = open_source(f"tars:{tmp_path}/0.tar")
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def _benchmark_folder(root, retrieval: bool):
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("2\n")
    for shard in range(2):
        members = []
        for number in range(3):
            key = f"s{shard * 3 + number:07d}"
            members.append((f"{key}.webp", jpeg(number)))
            if retrieval:
                members.append((f"{key}.txt", f"first {number}\nsecond {number}\n".encode()))
            else:
                members.append((f"{key}.cls", str(number % 2).encode()))
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "classnames.txt").write_text("crane\ncrane bird\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")


def test_clip_benchmark_classification(tmp_path):
    _benchmark_folder(tmp_path, retrieval=False)
    source = open_source(f"clip_benchmark:{tmp_path}")
    assert source.class_names == ["crane", "crane bird"]
    labels = [source.read(i, ("label",))["label"] for i in range(6)]
    assert labels == [0, 1, 0, 0, 1, 0]
    assert list(source.templates) == ["a photo of a {c}."]


def test_clip_benchmark_retrieval_has_one_caption_a_line(tmp_path):
    _benchmark_folder(tmp_path, retrieval=True)
    source = open_source(f"clip_benchmark:{tmp_path}?split=test")
    assert source[4]["text"] == ["first 1", "second 1"]
    assert "label" not in source[4]


def test_keys_are_cut_at_the_first_dot(tmp_path):
    members = [("a.b/x.seg.png", b"1"), ("a.b/x.txt", b"t"), (".hidden.jpg", b"h"), ("noext", b"n")]
    write_tar(tmp_path / "0.tar", members)
    table = build_index(str(tmp_path / "0.tar")).table
    assert table["key"].tolist() == [b"a.b/x"]
    assert np.all(table["image_size"] == 1)


@pytest.mark.parametrize("names", [("7.depth.png", "7.jpg"), ("7.jpg", "7.depth.png")])
def test_the_whole_extension_comes_before_its_end(tmp_path, names, caplog):
    data = {"7.depth.png": b"depth", "7.jpg": b"picture"}
    members = [(name, data[name]) for name in names]
    write_tar(tmp_path / "0.tar", [*members, ("7.seg.png", b"mask"), ("7.txt", b"words")])
    source = open_source(f"tars:{tmp_path}/0.tar")
    assert source[0]["image"] == b"picture"
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    ("names", "count", "lost", "first"),
    [
        ([f"img.{i:03d}.{e}" for i in range(20) for e in ("jpg", "txt")], 1, 38, "img.001.jpg"),
        ([f"{i % 10}.jpg" for i in range(20)], 10, 10, "0.jpg"),
        (["a.jpg", "a.png"], 1, 1, "a.png"),
    ],
)
def test_members_that_find_no_place_are_counted(tmp_path, names, count, lost, first, caplog):
    write_tar(tmp_path / "0.tar", [(name, b"data") for name in names])
    for _ in range(2):  # Also when the index is only read.
        caplog.clear()
        source = open_source(f"tars:{tmp_path}/0.tar")
        assert len(source) == count
        assert f"{lost} members of 1 tars are not used, first {first} in" in caplog.text


def test_captions_of_any_bytes_can_be_tokenized(tmp_path):
    lone = b'{"caption": "a cat \\ud83d", "many": ["a", null, "\\udce9"]}'
    members = [("0.txt", "\ufeffa cat".encode()), ("0.json", lone), ("1.txt", "é".encode("latin1"))]
    write_tar(tmp_path / "0.tar", members)
    line = f"tars:{tmp_path}/0.tar?text="
    assert open_source(f"{line}txt")[0]["text"] == "a cat"
    assert open_source(f"{line}lines")[0]["text"] == ["a cat"]
    assert open_source(f"{line}txt")[1]["text"] == "\ufffd"
    assert open_source(f"{line}json:caption")[0]["text"] == "a cat ?"
    assert open_source(f"{line}json:many")[0]["text"] == ["a", "?"]


def test_a_wrong_json_field_is_named_with_those_there(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(3))
    write_tar(tmp_path / "1.tar", [("0.json", b'{"seldom": "x"}')])
    with pytest.raises(ValueError, match=r"no field 'captoin'. They have: caption, key, seldom"):
        open_source(f"tars:{tmp_path}?text=json:captoin")
    assert len(open_source(f"tars:{tmp_path}?text=json:seldom")) == 4
    write_tar(tmp_path / "1.tar", [("0.jpg", jpeg(0))])
    with pytest.raises(ValueError, match="no JSON members; they have image"):
        open_source(f"tars:{tmp_path}/1.tar?text=json:caption")


def test_tars_say_which_fields_they_lack(tmp_path):
    members = [("0.jpg", jpeg(0)), ("0.json", b'{"caption": "x", "url": "y"}')]
    write_tar(tmp_path / "0.tar", members)
    source = open_source(f"tars:{tmp_path}/0.tar")
    assert set(source.lacks) == {"audio", "text", "label"}
    with pytest.raises(ValueError, match=r"'here' has no .txt .* \(caption, url\) with text=json"):
        require_fields(source, ("image", "text"), "here")
    require_fields(source, ("image",), "here")
    assert "text" not in open_source(f"tars:{tmp_path}/0.tar?text=json:caption").lacks
    write_tar(tmp_path / "0.tar", [("0.cls", b"1"), ("0.txt", b"x")])
    assert set(open_source(f"tars:{tmp_path}").lacks) == {"audio", "image"}


def test_a_member_with_an_endless_name_is_damage(tmp_path):
    """A table of names is as wide as its longest one."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("1.txt", "x" * 60_000 + ".txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="60005 bytes: damaged"):
        open_source(f"tars:{path}")
