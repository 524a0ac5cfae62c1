"""Transfers between object stores and the local disk: copies for reading, and uploads of results.

Objects that are read at random by memory maps or by other libraries (weights, tokenizers, arrays,
stored embeddings, Arrow files) are copied once, and again if the object was rewritten.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cwcl_jax.files import locked, replacing, write_text
from cwcl_jax.paths import StorePath, is_url, to_path, version_of
from cwcl_jax.progress import beat

_VERSIONS = ".versions.json"
_SECONDS_BETWEEN_NEWS = 20.0
_AT_ONCE = 8


def cache_home(cache_dir: str = "") -> Path:
    """Returns the folder for what this package stores: `cache_dir`, by default the user's cache."""
    if cache_dir:
        return to_path(cache_dir).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "cwcl_jax"


def disk_home(cache_dir: str = "") -> Path:
    """Returns `cache_home`, or the user's cache if `cache_dir` is on an object store."""
    return cache_home("" if is_url(cache_dir) else cache_dir)


def local_copy(path: Path, cache_dir: str = "") -> Path:
    """Returns a local path with the content of `path`: itself, or a copy of an object or folder.

    Copies are stored in the cache folder (`disk_home`). The processes of a machine share a copy,
    which one of them makes.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: a name below it leads out of the folder.
    """
    if not isinstance(path, StorePath):
        return path
    folder = disk_home(cache_dir) / "objects" / hashlib.sha256(str(path).encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", waiting=beat):
        _bring(path, folder)
    return folder / path.name


def _bring(path: StorePath, folder: Path) -> None:
    """Copies what is missing in the folder or has changed, and removes what the store lost."""
    info = path.info()
    found = {path: info} if info["type"] == "file" else path.files()
    start = len(str(path)) - len(path.name)  # a bucket has no parent
    wanted = {str(file)[start:]: version_of(said) for file, said in found.items()}
    if bad := [name for name in wanted if ".." in name.split("/")]:
        raise ValueError(f"{path} holds {bad[0]!r}, whose name leads out of the folder")
    try:
        kept = json.loads((folder / _VERSIONS).read_text(encoding="utf-8"))
        had = {name: tuple(version) for name, version in kept.items()}
    except (OSError, ValueError):
        had = {}
    for name in had.keys() - wanted.keys():
        (folder / name).unlink(missing_ok=True)
    missing = [n for n, v in wanted.items() if had.get(n) != v or not (folder / n).is_file()]
    size, done, told = sum(wanted[name][0] for name in missing), 0, time.monotonic()
    if size > 100e6:
        print(f"copying {path} ({size / 1e9:.1f} GB) to {folder}, once", file=sys.stderr)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = pool.map(lambda name: _copy(path.parent / name, folder / name), missing)
        for name, _ in zip(missing, jobs, strict=True):
            beat()
            had[name], done = wanted[name], done + wanted[name][0]
            if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
                told = time.monotonic()
                print(f"copied {done / 1e9:.1f} of {size / 1e9:.1f} GB", file=sys.stderr)
    if missing or had != wanted:
        write_text(folder / _VERSIONS, json.dumps(wanted))


def _copy(source: StorePath, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        source.download(partial)


@contextlib.contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Yields a local path for a file or folder: `output`, or one that is uploaded there at the end.

    Large files are uploaded first. The small ones describe a folder, so that a folder of an
    interrupted upload is not valid. After an error nothing is uploaded.
    """
    if not isinstance(output, StorePath):
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="cwcl_jax-") as folder:
        yield Path(folder, output.name)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: -file.stat().st_size):
            beat()
            (output.parent / file.relative_to(folder)).upload(file)
