"""Losses by short names, as tables and command lines write them: contrastive, relu2, exp0.1.

A name is a loss of `LossConfig.name`, or a weight function and then means CWCL with it. A number
behind a weight function sets its one parameter; without it the parameter is `LossConfig`'s.

    affine, centred         cos/2 + 1/2 (the paper's); the same on mean-free embeds
    uniform0.53             0.53 for every other pair, 1 for the true one: no similarities
    relu2, exp0.1           max(cos, 0)^2; exp((cos - 1) / 0.1)
    calibrated0.5           exp, calibrated_relu0.5 relu, sharp enough in every batch for the true
                            pair to get half of its row's target

"uniform" is uniform1, where all pairs weigh the same.
"""

import re
from typing import Any

from cwcl_jax.losses.options import NAMES, LossConfig

# Not "cwcl", which its weights name, nor "uniform", which is a weight function here.
_LOSSES = tuple(name for name in NAMES if name not in ("cwcl", "uniform"))
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
    """Fields of `LossConfig` for a short name.

    Raises:
      ValueError: an unknown name, or a number where there is none.
    """
    if short in _LOSSES:
        return {"name": short}
    match = re.fullmatch(r"([a-z_]+?)([0-9]+(?:\.[0-9]+)?)?", short)
    name, number = (match[1], match[2]) if match else (short, None)
    if name not in _NUMBER or (number and not _NUMBER[name]):
        known = ", ".join([*_LOSSES, *(n + ("NUMBER" if f else "") for n, f in _NUMBER.items())])
        raise ValueError(f"no loss is called {short!r}; use one of {known}.")
    fields: dict[str, Any] = {"name": "cwcl", "weight_function": name}
    if parameter := _NUMBER[name]:
        # Also the default: the name means the same whatever it is put in place of.
        fields[parameter] = float(number) if number else getattr(LossConfig, parameter)
    return fields
