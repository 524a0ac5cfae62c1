"""Finding and reading files for sources: patterns, missing files, plain reads."""

import glob
import itertools
import os
import re
from pathlib import Path

from cwcl_jax.data.skipping import BadExample

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_pattern(pattern: str) -> list[str]:
    """Expands `{00000..00301}` and `{a,b}`, then `*` and `?`; a plain path stays as it is."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r} is not a local path. Mount the bucket or copy the files first: they are "
            "read at random offsets."
        )
    names = _expand_braces(os.path.expanduser(pattern))
    found: list[str] = []
    for name in names:
        if any(sign in name for sign in "*?["):
            matches = sorted(glob.glob(name))
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
    """The path, or a FileNotFoundError that says what should have been there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{what} not found: {found}. Check the path in the source line.")
    return found


def read_bytes(path: str | Path) -> bytes:
    """The whole file; a file that cannot be read is a bad example, not the end of the run."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadExample("file missing", str(path)) from error
    except (OSError, ValueError) as error:
        raise BadExample("file unreadable", f"{path}: {error}") from error


def identity_of(path: str | Path) -> tuple[str, int]:
    """Name and size: what stands for a file in a fingerprint (copies keep both)."""
    return os.path.basename(path), os.stat(path).st_size
