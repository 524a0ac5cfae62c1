"""Losses by short names, as tables and command lines write them: contrastive, relu2, exp0.1."""

import re
from typing import Any

_PRESETS = ("contrastive", "sigmoid")
# Weight function -> the field that a number behind its name sets.
_NUMBER = {
    "affine": "",
    "centred": "",
    "uniform": "weight_offdiagonal",
    "relu": "weight_power",
    "exp": "weight_temperature",
    "calibrated": "target_diagonal",
    "calibrated_relu": "target_diagonal",
}


def loss_fields(short: str) -> dict[str, Any]:
    """Fields of `LossConfig` for a short name; a weight function alone means CWCL with it.

    Raises:
      ValueError: an unknown name, or a number where there is none.
    """
    if short in _PRESETS:
        return {"name": short}
    match = re.fullmatch(r"([a-z_]+?)([0-9]+(?:\.[0-9]+)?)?", short)
    name, number = (match[1], match[2]) if match else (short, None)
    if name not in _NUMBER or (number and not _NUMBER[name]):
        known = ", ".join([*_PRESETS, *(n + ("NUMBER" if f else "") for n, f in _NUMBER.items())])
        raise ValueError(f"no loss is called {short!r}; use one of {known}.")
    fields: dict[str, Any] = {"name": "cwcl", "weight_function": name}
    return fields | ({_NUMBER[name]: float(number)} if number else {})
