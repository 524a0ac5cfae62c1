"""Object stores, with fsspec's store in memory: what a bucket does is in `tests/drill_store.py`."""

import io
import json
import pickle
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cwcl_jax import files, paths
from cwcl_jax.config import ConfigError, with_tasks
from cwcl_jax.copies import local_copy, writing
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingStore, EmbeddingWriter
from cwcl_jax.data.sources import open_source
from cwcl_jax.evaluation.class_names import read_class_names
from cwcl_jax.evaluation.prompts import load_templates
from cwcl_jax.files import InUse, locked, replacing, write_text
from cwcl_jax.paths import StoreError, StorePath, to_path
from cwcl_jax.training.growing import Growing
from cwcl_jax.training.metrics import TensorBoard
from cwcl_jax.training.workdir import check_place
from cwcl_jax.weights.locate import locate
from tests.data.making import jpeg, pairs, write_tar
from tests.training.toy import toy_config


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty store, and the requests to it as (method, name) in order."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "_WAITS", (0.0, 0.0))
    return to_path("memory://bucket")


@pytest.fixture
def requests(monkeypatch):
    """What is asked of the store: (method, end of the path)."""
    asked = []
    for method in ("cat_file", "pipe_file", "put_file", "get_file", "info"):
        plain = getattr(MemoryFileSystem, method)

        def counted(self, *args, _plain=plain, _method=method, **options):
            asked.append((_method, str(args[-1 if _method == "put_file" else 0]).split("/")[-1]))
            return _plain(self, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, method, counted)
    return asked


def test_a_store_path_is_a_path(bucket):
    path = bucket / "run" / "a.txt"
    assert isinstance(path, Path)
    assert str(path) == "memory://bucket/run/a.txt" == str(pickle.loads(pickle.dumps(path)))
    assert (path.name, path.suffix, str(path.parent)) == ("a.txt", ".txt", "memory://bucket/run")
    assert to_path("/tmp/a") == Path("/tmp/a")
    assert not isinstance(to_path("/tmp/a"), StorePath)
    write_text(path, "grüße\n")
    assert path.read_text(encoding="utf-8") == "grüße\n"
    with path.open("r", encoding="utf-8") as file:
        assert file.read() == "grüße\n"
    assert path.is_file()
    assert (bucket / "run").is_dir()
    assert not (bucket / "other").exists()
    assert list((bucket / "run").glob("*.txt")) == [path] == list((bucket / "run").iterdir())
    path.replace(bucket / "moved.txt")
    assert [str(file) for file in bucket.files()] == ["memory://bucket/moved.txt"]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_what_an_error_interrupts_is_not_stored(bucket, mode):
    write_text(bucket / "a", "old")
    half = "half" if mode == "w" else b"half"
    with suppress(ZeroDivisionError), replacing(bucket / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with suppress(ZeroDivisionError), (bucket / "a").open(mode) as file:
        file.write(half)
        raise ZeroDivisionError
    assert (bucket / "a").read_text() == "old"


def test_trouble_that_passes_is_waited_for(bucket, monkeypatch, capsys):
    write_text(bucket / "a", "text")
    errors = [TimeoutError("slow"), OSError(5, "InternalError")]
    plain = MemoryFileSystem.cat_file

    def failing(self, *args, **options):
        if errors:
            raise errors.pop()
        return plain(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    assert (bucket / "a").read_text() == "text"
    assert capsys.readouterr().err.count("trying again") == 2
    errors += [TimeoutError("slow")] * 9
    with pytest.raises(StoreError, match="memory://bucket/a cannot be reached: TimeoutError: slow"):
        (bucket / "a").read_text()
    errors[:] = [PermissionError("Forbidden")]
    with pytest.raises(PermissionError):
        (bucket / "a").read_text()
    assert not errors


def test_a_lock_has_one_holder(bucket, monkeypatch):
    monkeypatch.setattr(files, "_RENEW", 0.02)
    held = locked(bucket / "lock")
    with held, pytest.raises(InUse, match=r"process \d+ on "), locked(bucket / "lock"):
        pass
    with locked(bucket / "lock"):
        pass
    assert not bucket.exists()


def test_a_lock_whose_holder_died_is_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(files, "_STALE_ON_STORE", 0.1)
    monkeypatch.setattr(files, "_POLL", 0.01)
    (bucket / "lock.held").write_text("process 1 on elsewhere, abc, 7")
    with locked(bucket / "lock"):
        assert "elsewhere" not in (bucket / "lock.held").read_text()


def test_an_answer_that_was_lost_does_not_look_like_another_holder(bucket):
    # The first attempt was stored; the second one finds it.
    (bucket / "a").write_bytes(b"mine")
    (bucket / "a").write_new(b"mine")
    with pytest.raises(FileExistsError):
        (bucket / "a").write_new(b"other")


def test_a_growing_file_is_stored_now_and_then(bucket, requests, monkeypatch):
    (bucket / "m").write_bytes(b"0\n")
    requests.clear()
    file = Growing(bucket / "m")
    for number in range(1, 50):
        file.append(b"%d\n" % number)
    assert (bucket / "m").read_bytes() == b"0\n"
    file.flush()
    file.flush()
    assert (bucket / "m").read_bytes() == b"".join(b"%d\n" % n for n in range(50))
    monkeypatch.setattr(Growing, "_EVERY", 0.0)
    monkeypatch.setattr(Growing, "_SHARE", 1.0)
    file._due = 0.0
    file.append(b"last\n")
    assert (bucket / "m").read_bytes().endswith(b"last\n")
    assert requests.count(("pipe_file", "m")) == 2


def test_tensorboards_file_is_copied(bucket):
    writer = TensorBoard(bucket / "tensorboard", 0)
    writer.write(1, {"loss": 2.0})
    assert not bucket.exists()
    writer.save()
    (file,) = bucket.files()
    size = len(file.read_bytes())
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert len(file.read_bytes()) > size


def _same(a, b, fields=("image", "text", "label", "features")) -> None:
    assert len(a) == len(b)
    for row in range(len(a)):
        one, other = a.read(row, fields), b.read(row, fields)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_equal(one[name], other[name])


def test_tars_are_read_by_ranges(bucket, requests, tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", pairs(5, 10 * number))
        (bucket / f"{number}.tar").upload(tmp_path / f"{number}.tar")
    local, remote = (open_source(f"tars:{place}/{{0..1}}.tar") for place in (tmp_path, bucket))
    assert local.fingerprint() == remote.fingerprint()
    assert (bucket / "0.tar.offsets").is_file()
    requests.clear()
    _same(local, remote)
    assert requests == [("cat_file", "0.tar")] * 5 + [("cat_file", "1.tar")] * 5
    requests.clear()
    assert len(open_source(f"tars:{bucket}/*.tar")) == 10
    assert ("cat_file", "0.tar") not in requests  # the index is kept beside
    (bucket / "0.tar").upload(tmp_path / "1.tar")
    assert open_source(f"tars:{bucket}/0.tar")[0]["text"] == local[5]["text"]


def test_a_store_that_is_down_does_not_skip_examples(bucket, tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", pairs(2))
    (bucket / "0.tar").upload(tmp_path / "0.tar")
    source = open_source(f"tars:{bucket}/0.tar")

    def down(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", down)
    with pytest.raises(StoreError):
        source[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_and_their_pictures(bucket, tmp_path, kind):
    for row in range(3):
        (tmp_path / f"{row}.jpg").write_bytes(jpeg(row))
    rows = {"image": [f"{row}.jpg" for row in range(3)], "text": ["a cat", "a dog", "a bird"]}
    lines = list(zip(*rows.values(), strict=True))
    text = {
        "csv": "image,text\n" + "".join(f"{a},{b}\n" for a, b in lines),
        "jsonl": "".join(json.dumps({"image": a, "text": b}) + "\n" for a, b in lines),
    }
    if kind == "parquet":
        pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    else:
        (tmp_path / f"t.{kind}").write_text(text[kind])
    for file in tmp_path.glob("*.*"):
        (bucket / "d" / file.name).upload(file)
    local, remote = (open_source(f"{kind}:{p}/t.{kind}") for p in (tmp_path, bucket / "d"))
    assert [remote[row]["text"] for row in range(3)] == rows["text"]
    _same(local, remote)


def test_embeds_and_arrays(bucket, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    description = EmbeddingDescription("image", (4,), "float32", 5, "s", "w", shard_size=3)
    for folder in (tmp_path / "e", bucket / "e"):
        writer = EmbeddingWriter(folder, description)
        for rows in writer.pending():
            writer.write(rows, [f"id{row}" for row in rows], vectors[rows.start : rows.stop])
        assert writer.is_complete()
        store = EmbeddingStore(folder)
        np.testing.assert_array_equal([store[row][1] for row in range(5)], vectors)
    buffer = io.BytesIO()
    np.savez(buffer, features=vectors)
    (bucket / "a.npz").write_bytes(buffer.getvalue())
    _same(open_source(f"embeddings:{tmp_path}/e"), open_source(f"embeddings:{bucket}/e"))
    assert locate(f"{bucket}/a.npz").read_bytes() == buffer.getvalue()
    mine = tmp_path / "mine"
    _same(open_source(f"embeddings:{bucket}/e", cache_dir=str(mine)),
          open_source(f"embeddings:{tmp_path}/e"))  # fmt: skip
    assert [*mine.glob("objects/*/e/description.json")]


def test_a_copy_is_made_once_and_again_after_a_change(bucket, requests):
    for name in ("a/x.txt", "a/sub/y.txt"):
        (bucket / name).write_text(name)
    copy = local_copy(bucket / "a")
    assert (copy / "sub" / "y.txt").read_text() == "a/sub/y.txt"
    assert local_copy(bucket / "a") == copy
    # Several threads fetch them, in any order.
    assert sorted(n for method, n in requests if method == "get_file") == ["x.txt", "y.txt"]
    (bucket / "a/x.txt").write_text("changed")
    (bucket / "a/sub/y.txt").unlink()
    assert (local_copy(bucket / "a") / "x.txt").read_text() == "changed"
    assert not (copy / "sub" / "y.txt").exists()
    assert local_copy(copy) == copy
    assert (local_copy(bucket) / "a/x.txt").read_text() == "changed"
    fsspec.filesystem("memory").pipe_file("/bucket/b/../../c", b"")
    with pytest.raises(ValueError, match="leads out of the folder"):
        local_copy(bucket / "b")


def test_a_folder_is_put_large_files_first(bucket, requests, tmp_path):
    with writing(bucket / "m") as output:
        output.mkdir()
        (output / "config.json").write_text("{}")
        (output / "weights").write_bytes(bytes(1000))
    assert [name for method, name in requests if method == "put_file"] == ["weights", "config.json"]
    with suppress(ZeroDivisionError), writing(bucket / "n") as output:
        output.write_text("half")
        raise ZeroDivisionError
    assert not (bucket / "n").exists()
    with writing(tmp_path / "m") as output:
        assert output == tmp_path / "m"


def test_what_a_store_cannot_hold_is_refused_at_the_start(bucket):
    config = toy_config()
    with pytest.raises(ConfigError, match="checkpoints can be written only to s3 and gs"):
        check_place(bucket / "run", config)
    with pytest.raises(ConfigError, match=r"config.profile='1:2': a trace cannot be written"):
        check_place(to_path("s3://b/run"), toy_config(profile="1:2"))
    check_place(Path("/nowhere"), toy_config(profile="1:2"))
    with pytest.raises(ValueError, match="only the kinds tars"):
        open_source(f"folder:{bucket}/pictures")
    with pytest.raises(ValueError, match="foo:// is no scheme that fsspec knows"):
        to_path("foo://bucket/a").exists()


def test_texts_of_evaluations_are_read(bucket):
    (bucket / "names.txt").write_text("cat\ndog\n")
    (bucket / "templates.txt").write_text("a {c}\n")
    (bucket / "tasks.json").write_text('{"pairs": {"kind": "retrieval", "source": "scenes:test"}}')
    assert read_class_names(f"{bucket}/names.txt") == ["cat", "dog"]
    assert load_templates(f"{bucket}/templates.txt") == ("a {c}",)
    config = with_tasks(toy_config(), f"{bucket}/tasks.json")
    assert [*config.evaluation.tasks] == ["pairs"]
    with pytest.raises(ConfigError, match=f"--tasks={bucket}/none.json: there is no such file"):
        with_tasks(toy_config(), f"{bucket}/none.json")


def test_missing_credentials_are_a_mistake_that_says_where_they_come_from(monkeypatch):
    class NoCredentials:
        def info(self, path):
            raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(paths, "client", lambda scheme: NoCredentials())
    for store, remedy in (("s3", "AWS_ACCESS_KEY_ID"), ("gs", "gcloud auth")):
        place = to_path(f"{store}://b/run")
        with pytest.raises(ConfigError) as refused:
            check_place(place, toy_config())
        told = str(refused.value)
        assert told.startswith(f"--workdir={store}://b/run: RuntimeError: Unable to locate")
        assert remedy in told
        assert "\n" not in told
