"""Files of arrays, opened by name: .npz, .npy, folders of .npy, safetensors, HDF5, zarr.

Large arrays stay in their file: an opened array has `shape`, `dtype` and rows by number, as in
numpy. Members of an uncompressed .npz are memory-mapped, compressed ones are read once.
"""

import functools
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cwcl_jax.copies import local_copy
from cwcl_jax.data.sources.files import require
from cwcl_jax.files import matching
from cwcl_jax.packages import import_package

# Smaller arrays are read whole, because their rows are then faster than from a file.
_KEPT_BYTES = 64 << 20
# The fingerprint of a larger array reads this much, spread over the whole array.
_COUNTED_BYTES = 1 << 30
_BLOCK_BYTES = 4 << 20
_HDF5 = (".h5", ".hdf5", ".he5")
_KINDS = f".npz, .npy, .safetensors, {', '.join(_HDF5)}, .zarr or a folder of .npy files"


def load_arrays(path: Path) -> dict[str, Any]:
    """Returns the arrays of a file or folder by name; for a single .npy the name is the file's.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: it is of another kind, damaged, or holds Python objects.
      MissingPackage: its kind needs a package that is not installed.
    """
    path = local_copy(require(path, "The file of arrays"))
    suffix = path.suffix.lower()
    if path.is_dir() and suffix != ".zarr":
        files = matching(path, "*.npy")
        if not files:
            raise ValueError(f"The file of arrays is a folder: {path}, which has no .npy files.")
        return {file.stem: _load_npy(file) for file in files}
    load = {".npz": _load_npz, ".safetensors": _load_safetensors, ".zarr": _load_zarr}
    load |= dict.fromkeys(_HDF5, _load_hdf5)
    if suffix == ".npy":
        return {path.stem: _load_npy(path)}
    if suffix not in load:
        raise ValueError(f"{path} must be {_KINDS}.")
    arrays = load[suffix](path)
    if not arrays:
        raise ValueError(f"{path} holds no arrays.")
    return arrays


def _load_npy(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(file, error) from error
    return _small_in_memory(array)


def _load_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("it is not a complete archive")
        with np.load(file, allow_pickle=False) as archive, open(file, "rb") as handle:
            members = {m.filename.removesuffix(".npy"): m for m in archive.zip.infolist()}
            mapped = {name: _map_member(handle, members[name]) for name in archive.files}
            return {n: archive[n] if array is None else array for n, array in mapped.items()}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from error


def _map_member(handle: IO[bytes], member: zipfile.ZipInfo) -> np.ndarray | None:
    """Returns a large uncompressed member as a memory map; None if it must be read."""
    encrypted = member.flag_bits & 1
    if member.compress_type != zipfile.ZIP_STORED or encrypted or member.file_size < _KEPT_BYTES:
        return None
    # Name and extra field of the local header may have other lengths than in the directory.
    handle.seek(member.header_offset + 26)
    lengths = np.frombuffer(handle.read(4), "<u2")
    handle.seek(member.header_offset + 30 + int(lengths.sum()))
    begin = handle.tell()
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0
    header = read if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(handle)
    if dtype.hasobject:
        return None
    first = handle.tell()
    array = np.memmap(handle, dtype, "r", first, shape, "F" if fortran else "C")
    if first - begin + array.nbytes > member.file_size:
        raise ValueError(f"the member {member.filename} is shorter than its header says")
    return array


def _load_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _load_hdf5(file: Path) -> dict[str, Any]:
    h5py = import_package("h5py", "hdf5", "HDF5")
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise ValueError(f"the values of the data set {name!r} are in other files")
        text = h5py.check_string_dtype(item.dtype)
        found[name] = np.asarray(item.asstr()[()]) if text else item

    try:
        # visititems does not follow links to other files.
        h5py.File(file, "r", locking="best-effort").visititems(visit)
        return {name: _small_in_memory(array) for name, array in found.items()}
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(file, error) from error


def _load_zarr(folder: Path) -> dict[str, Any]:
    zarr = import_package("zarr", "zarr", "Zarr")
    try:
        opened = zarr.open(str(folder), mode="r")
        if isinstance(opened, zarr.Array):
            return {folder.stem: _small_in_memory(opened)}
        return {name: _small_in_memory(array) for name, array in _zarr_arrays(opened)}
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _zarr_arrays(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, array in group.arrays():
        yield prefix + name, array
    for name, inner in group.groups():
        yield from _zarr_arrays(inner, f"{prefix}{name}/")


def _small_in_memory(array: Any) -> Any:
    if isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        return array
    return np.array(array[()]) if array.nbytes < _KEPT_BYTES or not array.shape else array


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {error}. Write it again; arrays of Python objects must become "
        "numbers or strings (array.astype(str))."
    )


def take_rows(array: Any, indices: np.ndarray) -> np.ndarray:
    """Returns some rows of an opened array, in the requested order."""
    if isinstance(array, np.ndarray):
        return array[indices]
    return np.stack([array[int(index)] for index in indices])


def checksum(array: Any) -> int:
    """Returns CRC-32 of all bytes in C order; above 1 GiB, of 256 blocks spread over the array."""
    if array.dtype.kind == "O":
        return zlib.crc32("\x1f".join(map(str, array)).encode("utf-8", "replace"))
    length = array.shape[0]
    rows = max(1, _BLOCK_BYTES // max(1, array.nbytes // max(1, length)))
    starts = range(0, length, rows)
    if array.nbytes > _COUNTED_BYTES:
        blocks = _COUNTED_BYTES // _BLOCK_BYTES
        starts = sorted({int(start) for start in np.linspace(0, length - rows, blocks)})
    return functools.reduce(
        lambda total, start: zlib.crc32(_flat(array[start : start + rows]).data, total), starts, 0
    )


def _flat(block: Any) -> np.ndarray:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def summaries(arrays: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Returns name, shape, dtype and checksum of every array, for fingerprints."""
    return [
        (name, tuple(array.shape), array.dtype.str, checksum(array))
        for name, array in sorted(arrays.items())
    ]
