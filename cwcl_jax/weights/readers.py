"""Opens files of arrays: names, shapes and dtypes are read first, arrays on demand.

`open_weights` recognises safetensors, NumPy `.npz`, Flax `.msgpack`, with PyTorch installed
`.bin`/`.pt`/`.pth`, and the index of a file in shards. No code from a file is ever run: `.npz` is
read without pickles, PyTorch files with `weights_only=True`.
"""

import dataclasses
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cwcl_jax.files import matching, parse_json
from cwcl_jax.packages import import_package

_DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Shape and dtype of one array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@runtime_checkable
class Weights(Protocol):
    """A file (or a view of one): entries by name, and reading one of them."""

    @property
    def source(self) -> str: ...

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> np.ndarray: ...


_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsFile:
    """One `.safetensors` file. Arrays are read by offset: a memory map would count as memory."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._path = path
        try:
            # The library validates the header: sizes, types, gaps, overlaps, the file's end.
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path}: truncated, damaged, or not a safetensors file ({error}): fetch it again"
            ) from error
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._start = 8 + length
        self._offsets = {name: tuple(value["data_offsets"]) for name, value in header.items()}
        self.entries = {
            name: Entry(tuple(value["shape"]), _safetensors_dtype(path, name, value["dtype"]))
            for name, value in header.items()
        }

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        start, _ = self._offsets[name]
        count = int(np.prod(entry.shape, dtype=np.int64))
        with self._path.open("rb") as file:
            file.seek(self._start + start)
            return np.fromfile(file, entry.dtype, count).reshape(entry.shape)


def _safetensors_dtype(path: Path, name: str, dtype: str) -> np.dtype[Any]:
    if dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: array {name!r} has type {dtype}, which is not supported")
    return _SAFETENSORS_DTYPES[dtype]


class ShardedFile:
    """The files named by an index such as `model.safetensors.index.json`."""

    def __init__(self, index: Path) -> None:
        self.source = str(index)
        shards = {path.name: open_weights(path) for path in _shards(index)}
        self._shard_of = {name: shards[shard] for name, shard in _weight_map(index).items()}
        for name, shard in self._shard_of.items():
            if name not in shard.entries:
                raise ValueError(f"{index}: {name!r} is not in its shard {shard.source}")
        self.entries = {name: shard.entries[name] for name, shard in self._shard_of.items()}

    def read(self, name: str) -> np.ndarray:
        return self._shard_of[name].read(name)


def _weight_map(index: Path) -> dict[str, str]:
    """Returns array name -> file name."""
    try:
        found = dict(parse_json(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not an index of shards: {error!r}") from error
    for name in found.values():
        # A name with folders could point anywhere, and an index could point at itself.
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix == ".json":
            raise ValueError(f"{index}: {name!r} is not the name of a weights file next to it")
    return found


def _shards(index: Path) -> list[Path]:
    paths = [index.parent / name for name in sorted(set(_weight_map(index).values()))]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{index} names the shard {path.name}, which is not there")
    return paths


class NpzFile:
    """A NumPy `.npz`; headers are read from the archive's members without their data."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path}: truncated, or not an .npz file ({error}): fetch it again"
            ) from error
        except (OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: damaged ({error}): fetch it again") from error
        members = [name for name in self._archive.namelist() if name.endswith(".npy")]
        self.entries = {name.removesuffix(".npy"): self._header(name) for name in members}

    def _header(self, member: str) -> Entry:
        with self._open(member) as file:
            try:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read(file)
            except (*_DAMAGE, KeyError) as error:
                raise ValueError(f"{self.source}: array {member!r} has no NumPy header") from error
        if dtype.hasobject:
            raise ValueError(
                f"{self.source}: {member!r} holds pickled Python objects, which are never loaded: "
                "save plain arrays"
            )
        size, claimed = self._archive.getinfo(member).file_size, math.prod(shape) * dtype.itemsize
        if not 0 <= claimed <= size:
            raise ValueError(
                f"{self.source}: array {member!r} says that it has {claimed} bytes, in a file of "
                f"{size}: fetch it again"
            )
        return Entry(shape, _without_void(dtype))

    def _open(self, member: str) -> zipfile.ZipExtFile:
        try:
            return self._archive.open(member)  # pyright: ignore[reportReturnType]
        except (*_DAMAGE, NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"{self.source}: array {member!r} is damaged ({error}): fetch the file again"
            ) from error

    def read(self, name: str) -> np.ndarray:
        with self._open(f"{name}.npy") as file:
            try:
                array = np.lib.format.read_array(file, allow_pickle=False)
            except _DAMAGE as error:
                raise ValueError(
                    f"{self.source}: array {name!r} is damaged ({error}): fetch the file again"
                ) from error
        return array.view(_without_void(array.dtype))


def _without_void(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns bfloat16 for two anonymous bytes, as which NumPy stores it."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


class InMemory:
    """Arrays that are already in memory."""

    def __init__(self, source: str, arrays: Mapping[str, Any]) -> None:
        self.source = source
        self._arrays = arrays
        self.entries = {
            name: Entry(tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()
        }

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._arrays[name])


def _read_msgpack(path: Path) -> InMemory:
    """Returns a tree of arrays that Flax wrote, with `/`-joined names."""
    from flax import serialization, traverse_util

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:
        raise ValueError(
            f"{path}: truncated, or not a Flax msgpack file ({type(error).__name__}): "
            "fetch it again"
        ) from error
    for name, leaf in flat.items():
        if not isinstance(leaf, np.ndarray | np.generic):
            raise ValueError(
                f"{path}: {name[:80]!r} is no array but {type(leaf).__name__}: the file is "
                "damaged, or holds more than weights"
            )
    return InMemory(str(path), {name.removeprefix("params/"): x for name, x in flat.items()})


class TorchFile:
    """A PyTorch state dict, memory-mapped by PyTorch if its format allows."""

    def __init__(self, path: Path) -> None:
        torch = import_package("torch", "torch", f"{path}, a PyTorch file,")
        self.source = str(path)
        zipped = zipfile.is_zipfile(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{path}: PyTorch cannot load it as plain weights ({reason}). It may be truncated, "
                "or hold pickled code, which is never executed: convert it to safetensors"
            ) from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        self._tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
        self.entries = {
            name: Entry(tuple(x.shape), _torch_dtype(x.dtype)) for name, x in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach()
        if str(tensor.dtype) == "torch.bfloat16":
            import torch

            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _torch_dtype(dtype: Any) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


# In order of preference inside a folder.
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "flax_model.msgpack",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def weights_file(path: Path) -> Path:
    """Returns the file to open: `path` itself, or the weights inside a folder."""
    if not path.is_dir():
        return path
    for name in _FOLDER_FILES:
        if (path / name).exists():
            return path / name
    for pattern in ("*.safetensors", "*.npz"):
        found = matching(path, pattern)
        if len(found) == 1:
            return found[0]
    raise FileNotFoundError(
        f"{path} holds none of {', '.join(_FOLDER_FILES)}, nor a single .safetensors or .npz file"
    )


READERS: dict[str, Callable[[Path], Weights]] = {
    ".safetensors": SafetensorsFile,
    ".npz": NpzFile,
    ".msgpack": _read_msgpack,
    ".bin": TorchFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
}


def open_weights(path: Path) -> Weights:
    """Opens a file by its suffix and returns it. Shapes are known then; arrays are read singly."""
    path = weights_file(path)
    if path.name.endswith(".index.json"):
        return ShardedFile(path)
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: unknown kind of weights file {path.suffix!r}; known: {', '.join(READERS)}"
        )
    return READERS[path.suffix](path)


def files_of(path: Path) -> list[Path]:
    """Returns all files whose bytes make up the weights, for hashing."""
    path = weights_file(path)
    return [path, *_shards(path)] if path.name.endswith(".index.json") else [path]
