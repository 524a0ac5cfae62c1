"""Finding and reading files for sources: patterns, missing files, plain reads."""

import glob
import itertools
import os
import re
import stat
from pathlib import Path

from cwcl_jax.data.skipping import BadExample

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_pattern(pattern: str) -> list[str]:
    """Returns the paths of `{00000..00301}` and `{a,b}`, then `*`, `?` and `[...]`.

    Existing paths are not expanded.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r} is not a local path. Mount the bucket or copy the files first: they are "
            "read at random offsets."
        )
    found: list[str] = []
    for name in _expand_braces(pattern):
        if any(sign in name for sign in "*?[") and not os.path.exists(name):
            # Brackets are part of some folders' names.
            matches = sorted(glob.glob(name) or glob.glob(name.replace("[", "[[]")))
            if not matches:
                raise FileNotFoundError(f"No file matches {name!r}.")
            found.extend(matches)
        else:
            found.append(name)
    return found


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
            f"The range {{{body}}} in {pattern!r} must be two numbers in order, as "
            "{00000..00301}."
        )
    width = len(first) if len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def require(path: str | Path, what: str) -> Path:
    """Returns the path; a FileNotFoundError says what should have been there."""
    found = Path(path)
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
        raise ValueError(f"{what} is no regular file: {found}. It is read more than once.")
    return found


def require_text_file(path: str | Path, what: str) -> Path:
    """Returns the path like `require_file`; raises ValueError for another kind of file."""
    found = require_file(path, what)
    with found.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        raise ValueError(f"{found} is a Parquet file: write parquet:{found}.")
    if start[:2] == b"\x1f\x8b" or start == b"PK\x03\x04":
        raise ValueError(f"{found} is compressed or a spreadsheet: write it as plain text first.")
    return found


def read_bytes(path: str | Path) -> bytes:
    """Returns the whole file; an unreadable file is a bad example and does not end the run."""
    try:
        # Opening a pipe waits for a writer, and a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadExample("no regular file", str(path))
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadExample("file missing", str(path)) from error
    except (OSError, ValueError) as error:
        raise BadExample("file unreadable", f"{path}: {error}") from error
