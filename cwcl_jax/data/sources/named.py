"""Arrays with the user's own names: raw inputs under their name, features of a modality.

The source line assigns them: `raw=eeg` or `raw=NAME:ARRAY`, `features=image,text:TEXT_ARRAY`.
Nothing is guessed from an array's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cwcl_jax.data.skipping import BadExample

# Fields of an example that are reserved for something other than an array.
_TAKEN = ("id", "text", "audio", "label", "labels", "features")


@dataclass(frozen=True)
class ColumnOptions:
    """The options of a source line that name columns, if types or names are not sufficient.

    Attributes:
      image, audio, label, id: a column each.
      text, labels: one, or several separated by commas.
      raw, features: columns of numbers, as NAME or NAME:COLUMN.
    """

    image: str = ""
    audio: str = ""
    text: str = ""
    label: str = ""
    labels: str = ""
    id: str = ""
    raw: str = ""
    features: str = ""


def parse_names(raw: str, features: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns name -> array (or column) of the options raw= and features=, `NAME,NAME:COLUMN` each.

    Raises:
      ValueError: a name is empty, occurs twice, or has another meaning in an example.
    """
    found = {"raw": _split("raw", raw), "features": _split("features", features)}
    for name in found["raw"]:
        if name in found["features"]:
            raise ValueError(f"{name!r} is named by raw= and by features=; choose one.")
        if name in _TAKEN:
            raise ValueError(
                f"raw={raw!r}: {name!r} cannot name a raw array ({', '.join(_TAKEN)} mean "
                f"something else in an example); write raw=NAME:{found['raw'][name]}."
            )
    return found["raw"], found["features"]


def _split(option: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, _, column = part.partition(":")
        if not name or name in found:
            raise ValueError(
                f"{option}={text!r} must be different names, each as NAME or NAME:COLUMN, "
                "separated by commas."
            )
        found[name] = column or name
    return found


def raw_value(name: str, array: np.ndarray, example: str) -> Any:
    """Returns the array in its own dtype; a picture (uint8) for the field `image`.

    Raises:
      BadExample: it holds NaN or infinity, or `image` is not a picture.
    """
    if not _all_finite(array):
        raise BadExample(f"{name} not finite", example)
    if name != "image":
        return array
    colour = array.ndim == 3 and array.shape[-1] == 3
    if array.dtype != np.uint8 or not (colour or array.ndim == 2):
        raise BadExample(
            "image unreadable",
            f"{example}: the field image takes uint8 (y, x, 3) or (y, x), not {array.dtype} "
            f"{array.shape}; give the array another name with raw=NAME:COLUMN",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def label_of(value: Any, class_names: Sequence[str] | None, example: str) -> int:
    """Returns the label as an integer; with class names, a number out of range is unreadable."""
    label = int(value)
    if class_names is not None and not 0 <= label < len(class_names):
        raise BadExample(
            "label unreadable", f"{example}: {label} is not one of the {len(class_names)} classes"
        )
    return label


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype.kind in "biu":
        return True
    # The kind of ml_dtypes' narrow floats is "V".
    numbers = array if array.dtype.kind == "f" else array.astype(np.float32)
    return bool(np.isfinite(numbers).all())
