"""Weights files that are damaged or lie: one error in one line, no hang, no memory, no surprise."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import struct
import zipfile

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from cwcl_jax.weights.locate import sha256_of
from cwcl_jax.weights.readers import open_weights

ARRAYS = {
    "a/kernel": np.arange(600, dtype=np.float32).reshape(20, 30),
    "b": np.arange(40, dtype=np.float16),
}


def write(folder, ending):
    """A whole file of this kind."""
    path = folder / f"model{ending}"
    if ending == ".safetensors":
        save_file(ARRAYS, path, metadata={"format": "np"})
    elif ending == ".npz":
        np.savez(path, **ARRAYS)
    elif ending == ".msgpack":
        path.write_bytes(serialization.msgpack_serialize(ARRAYS))
    elif ending == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(x) for name, x in ARRAYS.items()}, path)
    else:
        save_file(ARRAYS, folder / "part.safetensors")
        path.write_text(json.dumps({"weight_map": dict.fromkeys(ARRAYS, "part.safetensors")}))
    return path


def changed(content, rng):
    """The bytes with a flipped bit, a zeroed or repeated block, or cut off."""
    content, place = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        content[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == 2:
        content[place:place] = content[place : place + 16]
    else:
        del content[place:]
    return bytes(content)


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".msgpack", ".pt", ".index.json"])
def test_a_damaged_file_is_one_error(tmp_path, ending):
    whole = write(tmp_path, ending).read_bytes()
    path = tmp_path / f"model{ending}"
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = []
    for _ in range(100):
        path.write_bytes(changed(whole, rng))
        try:
            weights = open_weights(path)
            for name in weights.entries:
                weights.read(name)
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert all(str(tmp_path) in error and len(error) < 600 for error in errors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def safetensors(header, size=64):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(shape=(4, 4), dtype="F32", offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": entry(offsets=(0, 1 << 40))}),
        safetensors({"a": entry(), "b": entry(offsets=(32, 64), shape=(8,))}),
        safetensors({"a": entry(dtype="F16")}),
        safetensors({"a": entry(shape=(-4, -4))}),
        safetensors({"a": entry(shape=(1 << 62, 1 << 62))}),
        safetensors({"a": entry(dtype="F99")}),
        safetensors({"a": [1, 2]}),
        safetensors(b"[" * 100_000),
        safetensors({}, size=4),
        bytes(4096),
        b"",
    ],
    ids=["beyond", "overlap", "dtype", "negative", "huge", "type", "list", "deep", "rest", "zeros",
         "empty"],
)  # fmt: skip
def test_a_safetensors_header_that_lies_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fetch it again"):
        open_weights(path)


@pytest.mark.parametrize("name", ["../part.safetensors", "/etc/passwd", "model.index.json", 3])
def test_an_index_that_names_other_places_is_refused(tmp_path, name):
    save_file(ARRAYS, tmp_path / "part.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.index.json"
    path.write_text(json.dumps({"weight_map": {"b": name}}))
    with pytest.raises(ValueError, match=r"model\.index\.json: .* is not the name of a weights"):
        open_weights(path)


def npy(shape, data=b""):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return b"" + header.getvalue() + data


def test_an_array_that_claims_more_than_its_file_holds_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy((1 << 40,), bytes(16)))
    with pytest.raises(ValueError, match=r"'a\.npy' says that it has 4398046511104 bytes"):
        open_weights(path)


@pytest.mark.parametrize("kind", ["hub cache", "hub folder", "beside"])
def test_a_file_is_checked_by_the_hash_that_came_with_it(tmp_path, kind):
    """A flipped bit of an array is no error of the format: only a hash shows it."""
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    file = path
    if kind == "hub cache":
        file = tmp_path / "blobs" / sha256
        file.parent.mkdir()
        path.rename(file)
        path.symlink_to(file)
    elif kind == "hub folder":
        notes = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
        notes.parent.mkdir(parents=True)
        notes.write_text(f"{'1' * 40}\n{sha256}\n1700000000.0\n")
    else:
        (tmp_path / "model.safetensors.sha256").write_text(f"{sha256}  model.safetensors\n")
    assert sha256_of(tmp_path) == sha256
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_weights(path).read("a/kernel") is not None
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was changed"):
        sha256_of(tmp_path)


def test_a_msgpack_tree_that_holds_no_arrays_is_refused(tmp_path):
    """As a flipped bit leaves it: the type of an entry is one byte."""
    path = tmp_path / "model.msgpack"
    content = bytearray(serialization.msgpack_serialize({"b": ARRAYS["b"]}))
    # 0xc7, a length and a type: Flax gives arrays type 1, and leaves what it does not know.
    content[content.index(b"\xc7") + 2] = 5
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'b' is no array but ExtType"):
        open_weights(path)
