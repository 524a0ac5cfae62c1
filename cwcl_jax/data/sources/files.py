"""Finding and reading files for sources: patterns, missing files, plain reads."""

import glob
import itertools
import os
import re
import stat
from pathlib import Path

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.paths import StoreError, StorePath, is_url, to_path

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_pattern(pattern: str) -> list[str]:
    """Returns the paths of `{00000..00301}` and `{a,b}`, then `*`, `?` and `[...]`.

    Existing paths are not expanded.
    """
    if pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r} is a pipe, but files are read at random offsets: give the path itself, "
            "also s3://... or gs://..."
        )
    found: list[str] = []
    for name in _expand_braces(pattern):
        if any(sign in name for sign in "*?[") and not to_path(name).exists():
            # Some folders have brackets in their names.
            matches = sorted(_glob(name) or _glob(name.replace("[", "[[]")))
            if not matches:
                raise FileNotFoundError(f"No file matches {name!r}.")
            found.extend(matches)
        else:
            found.append(name)
    return found


def _glob(pattern: str) -> list[str]:
    """Returns the paths that match; on a store, the bucket's name is not a pattern."""
    if not is_url(pattern):
        return glob.glob(pattern)
    scheme, _, rest = pattern.partition("://")
    bucket, _, below = rest.partition("/")
    return list(map(str, to_path(f"{scheme}://{bucket}").glob(below)))


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    options = _options_of(match.group(1), pattern)
    rest = _expand_braces(after)
    return [before + a + b for a, b in itertools.product(options, rest)]


def _options_of(body: str, pattern: str) -> list[str]:
    if ".." not in body:
        return body.split(",")
    first, _, last = body.partition("..")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(
            f"The range {{{body}}} in {pattern!r} must be two ascending numbers, as in "
            "{00000..00301}."
        )
    width = len(first) if len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def require(path: str | Path, what: str) -> Path:
    """Returns the path; a FileNotFoundError says what should have been there."""
    found = to_path(path)
    if not found.exists():
        raise FileNotFoundError(
            f"{what} was not found: {found}. Check the path in the source line."
        )
    return found


def require_file(path: str | Path, what: str) -> Path:
    """Returns the path like `require`; raises ValueError for a folder, a pipe or a device."""
    found = require(path, what)
    if found.is_dir():
        raise ValueError(f"{what} is a folder: {found}. Name the file in the source line.")
    if not found.is_file():
        raise ValueError(f"{what} is not a regular file: {found}. It is read more than once.")
    return found


def require_text_file(path: str | Path, what: str) -> Path:
    """Returns the path like `require_file`; raises ValueError for another kind of file."""
    found = require_file(path, what)
    start = found.read_range(0, 4) if isinstance(found, StorePath) else _start(found)
    if start == b"PAR1":
        raise ValueError(f"{found} is a Parquet file: write parquet:{found}.")
    if start[:2] == b"\x1f\x8b" or start == b"PK\x03\x04":
        raise ValueError(f"{found} is compressed or a spreadsheet: write it as plain text first.")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{found} is UTF-16: save it as UTF-8 first.")
    return found


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def below(root: Path, name: str) -> Path:
    """Returns the path of a file: below `root`, or `name` itself if it is absolute or a URL."""
    return to_path(name) if is_url(name) or os.path.isabs(name) else root / name


def read_bytes(path: str | Path) -> bytes:
    """Returns the whole file.

    Raises:
      BadExample: it is missing or unreadable, which does not end the run.
      StoreError: a store does not answer. This is not a bad example, because the examples that a
        run sees must not depend on it.
    """
    path = to_path(path)
    try:
        if isinstance(path, StorePath):
            return path.read_bytes()
        # Opening a pipe waits for a writer, and a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadExample("no regular file", str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadExample("file missing", str(path)) from error
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise BadExample("file unreadable", f"{path}: {error}") from error
