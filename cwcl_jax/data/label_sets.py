"""Sets of labels of examples, as numbers that a batch can hold."""

import ast
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cwcl_jax.data.skipping import BadExample

# Two strings with only white space between them, as in a printed numpy array.
_WITHOUT_COMMA = re.compile(r"""['"]\s+['"]""")


def labels_of(value: Any, separator: str, example: str = "") -> list[str]:
    """Returns the different labels of one cell, array, or list of these, as strings.

    A string holds several labels if it is a printed list (`['a', 'b']`, as pandas writes lists into
    CSV, or JSON), else if it contains separators. None, NaN and empty strings are no labels. The
    members of lists are whole labels.

    Args:
      value: the cells of one example, or one of them.
      separator: separates the labels of one string; "" if a string is one label.
      example: names the example in errors.

    Raises:
      BadExample: a printed list cannot be read.
    """
    return list(dict.fromkeys(_flat(value, separator, example)))


def _flat(value: Any, separator: str, example: str) -> Iterable[str]:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            inside = isinstance(item, (list, tuple, set, frozenset, np.ndarray))
            yield from _flat(item, "" if inside else separator, example)
    elif not isinstance(value, str):
        # Integers that a column with gaps converted to floats.
        whole = isinstance(value, float) and value.is_integer()
        yield str(int(value)) if whole else str(value)
    else:
        text = value.strip()
        if listed := _printed_list(text, example):
            yield from _flat(listed, "", example)
        elif text != "[]":
            parts = text.split(separator) if separator else [text]
            yield from filter(None, (part.strip() for part in parts))


def _printed_list(text: str, example: str) -> Sequence[Any]:
    """Returns the members of a list in a string; () if it is not a list, such as "[name]".

    Raises:
      BadExample: it looks like a list and cannot be read.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return ()
    try:
        found = ast.literal_eval(re.sub(r"\b(null|nan)\b", "None", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    broken = found is None and any(sign.isspace() for sign in text)
    if broken or _WITHOUT_COMMA.search(text):
        raise BadExample(
            "labels unreadable",
            f"{example}: {text[:60]!r} looks like a list but cannot be read as one; write "
            "['a', 'b']",
        )
    return found if isinstance(found, list) else ()


def numbered(labels: Sequence[str], size: int, example: str = "") -> np.ndarray:
    """Returns (size,) int32: a 31-bit hash of each label, padded with -1.

    Raises:
      BadExample: there are more labels than `size`.
    """
    if len(labels) > size:
        raise BadExample(
            "too many labels",
            f"{example} has {len(labels)}, more than config.data.max_labels={size}",
        )
    row = np.full(size, -1, np.int32)
    row[: len(labels)] = [zlib.crc32(label.encode()) & 0x7FFFFFFF for label in labels]
    return row
