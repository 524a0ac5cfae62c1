"""Types of argparse options: a mistake is one line that names the option and what it takes."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path


def names(known: Sequence[str], separator: str = ",") -> Callable[[str], list[str]]:
    """Some of the known names."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(separator)]
        for name in chosen:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is none of {f'{separator} '.join(known)}")
        return chosen

    return parse


def sizes(text: str) -> list[tuple[int, int]]:
    """Rows and widths, "256x64,1024x512"."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) for size in text.split(",")]
    pairs = [(int(size[1]), int(size[2])) for size in found if size]
    if len(pairs) < len(found):
        raise ArgumentTypeError(f"{text!r} is not N x d, such as 256x64,1024x512")
    return pairs


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on, "1,2,4"."""
    found = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", number) for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 on, such as 1,2,4")
    return [int(number) for number in found]


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def folder(text: str) -> Path:
    """A folder that is there or can be made."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ArgumentTypeError(f"{part} is a file; name a folder")
    return path


def positives(text: str) -> list[float]:
    """Numbers above 0, "14.3,100"."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(number > 0 for number in found):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 14.3,100")
    return found
