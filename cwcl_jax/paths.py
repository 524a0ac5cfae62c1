"""Paths on object stores (`s3://bucket/run`, `gs://...`) with the interface of local paths.

They are based on fsspec, as are orbax's own paths (`etils.epath`), zarr and pyarrow. The paths of
epath are not used: they are not `pathlib.Path`s, know only four schemes, and cannot create a file
only if it does not exist.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import stat as modes
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

# Seconds between attempts; each attempt includes the retries of the client library.
_WAITS = (2.0, 8.0)
# By default the attempts of s3fs last only a second in total.
_S3_RETRIES = {"retries": {"mode": "standard", "total_max_attempts": 6}}
_CHUNK = 1 << 20
# The package that a scheme needs, and the extra of this package that installs it.
_CLIENTS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}
_OF_S3 = (
    "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, from ~/.aws (AWS_PROFILE), "
    "or from the role of the machine"
)
_OF_GOOGLE = (
    "credentials come from GOOGLE_APPLICATION_CREDENTIALS, from `gcloud auth application-default "
    "login`, or from the service account of the machine"
)
# Where the clients find credentials.
_CREDENTIALS = {"s3": _OF_S3, "gs": _OF_GOOGLE, "gcs": _OF_GOOGLE}
# Schemes for checkpoints: those for which tensorstore has drivers.
CHECKPOINT_SCHEMES = ("s3", "gs")
# Errors that another attempt cannot repair.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ValueError,
    ImportError,
)


def to_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with the interface of `pathlib.Path`; one with `://` is on an object store."""
    text = os.fspath(path)
    return StorePath(text) if "://" in text else Path(text)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is on an object store."""
    return "://" in os.fspath(path)


class StoreError(OSError):
    """A store did not answer, after several attempts."""


class StorePath(PosixPath):
    """A path on an object store. Objects are written whole; folders are prefixes of names.

    While the store returns temporary errors, every operation is retried for about a minute, with
    growing pauses. The errors of local paths are raised as such, all others as StoreError.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, colon, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest.lstrip('/')}" if colon else scheme

    @property
    def scheme(self) -> str:
        """The part before `://`."""
        return str(self).partition("://")[0]

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Returns the result of a method of fsspec on this path."""
        store = client(self.scheme)
        return _retried(lambda: getattr(store, method)(str(self), *arguments, **options), str(self))

    def _url(self, name: str) -> StorePath:
        bare = name.partition("://")[2] if "://" in name else name
        return StorePath(f"{self.scheme}://{bare.lstrip('/')}")

    # What a path is

    def info(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns what the store reports about the object or prefix.

        Raises:
          FileNotFoundError: neither exists.
        """
        return self._call("info")

    def _kind(self) -> str:
        try:
            return self.info()["type"]
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def exists(self, **_: Any) -> bool:
        return bool(self._kind())

    def is_dir(self, **_: Any) -> bool:
        return self._kind() == "directory"

    def is_file(self, **_: Any) -> bool:
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        return False

    def stat(self, **_: Any) -> os.stat_result:
        """Returns only size and kind; everything else is 0 (see `version`)."""
        found = self.info()
        mode = modes.S_IFDIR if found["type"] == "directory" else modes.S_IFREG
        return os.stat_result((mode, 0, 0, 1, 0, 0, int(found.get("size") or 0), 0, 0, 0))

    def version(self) -> tuple[int, str]:
        """Returns size in bytes and a text that changes when the object is rewritten."""
        return version_of(self.info())

    def absolute(self) -> StorePath:
        return self

    def resolve(self, strict: bool = False) -> StorePath:
        del strict
        return self

    def expanduser(self) -> StorePath:
        return self

    # Reading

    def read_bytes(self) -> bytes:
        return self._call("cat_file")

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes from `offset`, in one request."""
        return self._call("cat_file", start=offset, end=offset + size) if size else b""

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        text = self.read_bytes().decode(encoding or "utf-8", errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def download(self, target: Path) -> None:
        """Writes the object to a local file."""
        self._call("get_file", str(target))

    # Lists

    def glob(self, pattern: str, **_: Any) -> Iterator[StorePath]:  # pyright: ignore
        store, where = client(self.scheme), f"{glob.escape(str(self))}/{pattern}"
        return iter([self._url(name) for name in _retried(lambda: store.glob(where), where)])

    def iterdir(self) -> Iterator[StorePath]:
        found = [self._url(name) for name in self._call("ls", detail=False)]
        return iter([path for path in found if path != self])

    def files(self) -> dict[StorePath, dict[str, Any]]:
        """Returns all objects below this prefix, sorted, with what the store reports about each."""
        found = self._call("find", detail=True)
        return {self._url(name): found[name] for name in sorted(found)}

    # Writing

    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Opens for reading (by ranges) or writing (whole, at `close`).

        Raises:
          ValueError: another mode, such as appending.
        """
        kind = mode.replace("b", "").replace("t", "")
        if kind not in ("r", "w", "x"):
            raise ValueError(f"{self} cannot be opened with mode={mode!r}: objects are whole")
        if kind != "r":
            store = self.write_new if kind == "x" else self.write_bytes
            return _Written(store) if "b" in mode else _WrittenText(store)
        raw = _Ranges(self)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, _CHUNK)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def write_bytes(self, data: Any) -> int:
        self._call("pipe_file", bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        self.write_bytes(data.encode(encoding or "utf-8"))
        return len(data)

    def write_new(self, data: Any) -> int:
        """Writes an object that must not exist yet, by a conditional request; returns its size.

        Raises:
          FileExistsError: it exists.
        """
        data = bytes(data)
        try:
            self._call("pipe_file", data, mode="create")
        except OSError:
            # The answer may be lost: then the second attempt finds what the first one wrote, which
            # differs from what other processes write.
            try:
                there = self.read_bytes()
            except FileNotFoundError:
                there = None
            if there is None:
                raise
            if there != data:
                raise FileExistsError(f"{self} exists") from None
        return len(data)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        del mode
        if not exist_ok:
            self.write_new(uuid.uuid4().bytes)  # random, as `write_new` requires
        elif not self.exists():
            self.write_bytes(b"")

    def upload(self, file: Path) -> None:
        """Writes the object from a local file, in parts if it is large."""
        store = client(self.scheme)
        _retried(lambda: store.put_file(str(file), str(self)), str(self))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a store has no folders, only names."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._call("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: str | os.PathLike[str]) -> StorePath:
        """Copies the object, or all below the prefix, and removes the old names; not atomic."""
        store, place = client(self.scheme), to_path(target)
        files = [self] if self.is_file() else list(self.files())
        for file in files:
            other = str(place if file == self else place / file.relative_to(self))
            _retried(lambda a=str(file), b=other: store.copy(a, b), str(file))
        for file in files:
            file.unlink(missing_ok=True)
        return StorePath(str(place))

    rename = replace  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        return StorePath, (str(self),)


class _Ranges(io.RawIOBase):
    """An object opened for reading; each read is a request."""

    def __init__(self, path: StorePath):
        self._path, self._at = path, 0
        self._size, _ = path.version()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._path.read_range(self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Written(io.BytesIO):
    """A buffer that is stored when it is closed, except if an exception ends its `with` block."""

    def __init__(self, store: Callable[[bytes], int]):
        super().__init__()
        self._store: Callable[[bytes], int] | None = store

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self._store = None
        super().__exit__(kind, *rest)

    def close(self) -> None:
        store, self._store = self._store, None
        data = b"" if self.closed else self.getvalue()
        super().close()
        if store is not None:
            store(data)


class _WrittenText(io.TextIOWrapper):
    """UTF-8 text that is stored as `_Written` is."""

    def __init__(self, store: Callable[[bytes], int]):
        self._raw = _Written(store)
        super().__init__(self._raw, encoding="utf-8", newline="")

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self._raw.__exit__(kind, *rest)
        super().__exit__(kind, *rest)


def version_of(info: dict[str, Any]) -> tuple[int, str]:
    """Returns size in bytes, and a text that changes when an object is rewritten."""
    names = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created")
    said = [str(info[name]) for name in names if info.get(name)]
    return int(info.get("size") or 0), hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]


def client(scheme: str) -> Any:
    """Returns fsspec's client of a scheme, which `etils.epath` uses too; a fork gets its own.

    It does not cache listings, because other processes write too.

    Raises:
      ValueError: fsspec does not know the scheme, or a package is missing.
    """
    import fsspec
    from fsspec.config import conf

    os.environ.setdefault("EPATH_USE_TF", "false")  # always the same library, whatever is installed
    conf.setdefault("s3", {}).setdefault("config_kwargs", _S3_RETRIES)
    for name in {scheme, {"gs": "gcs", "gcs": "gs"}.get(scheme, scheme)}:
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package, extra = _CLIENTS.get(scheme, ("", ""))
        how = f"pip install 'cwcl_jax[{extra}]'" if package else str(error)
        raise ValueError(f"{scheme}:// needs {package or 'a package'}: {how}") from error
    except ValueError as error:
        raise ValueError(f"{scheme}:// is no scheme that fsspec knows: {error}") from error


def _retried(action: Callable[[], Any], name: str) -> Any:
    """Returns the result of `action`, retried while the store returns temporary errors.

    Raises:
      PermissionError: credentials are missing or invalid.
      StoreError: the last attempt failed, too.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except PermissionError as error:
            raise _refused(name, str(error)) from error
        except _FINAL:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if "redential" in told:
                raise _refused(name, told) from error
            if wait is None or "PreconditionFailed" in told or "pre-condition" in told.lower():
                raise StoreError(f"{name} cannot be reached: {told}") from error
            print(f"{name}: {told}; trying again", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError


def _refused(name: str, told: str) -> PermissionError:
    """Returns the error for missing or invalid credentials, which says where they come from."""
    source = _CREDENTIALS.get(name.partition("://")[0], "")
    return PermissionError(f"{name}: {told}" + (f"; {source}" if source else ""))
