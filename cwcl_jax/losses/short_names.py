"""Losses by short names, as tables and command lines write them: contrastive, relu2, exp0.1.

A name is a preset, or a weight function, which means CWCL with that function. A number after a
weight function is its parameter; without a number the parameter has its default.

    affine, centred         cos/2 + 1/2 (the paper's); the same on mean-free embeddings
    uniform0.53             0.53 for every other pair, 1 for the true one: no similarities
    relu2, exp0.1           max(cos, 0)^2; exp((cos - 1) / 0.1)
    calibrated0.5           exp (calibrated_relu0.5: relu), sharp enough in every batch for the
                            positive pair to get half of its row's target

"uniform" is uniform1: all pairs have the same weight.
"""

from typing import Any

from cwcl_jax.losses.presets import PRESETS
from cwcl_jax.losses.weights import NUMBERS, parse_number, parse_weights


def loss_fields(short: str) -> dict[str, Any]:
    """Returns the fields of `LossConfig` for a short name.

    Raises:
      ValueError: an unknown name, or a number after a name that takes none.
    """
    name, _ = parse_number(short)
    if name in NUMBERS and name != "identity":
        try:
            parse_weights(short)
        except ValueError as error:
            raise ValueError(f"no loss is called {short!r}: {error}") from error
        return {"name": "cwcl", "weight_function": short}
    if short in PRESETS:
        return {"name": short}
    known = ", ".join([*PRESETS, *(n + "NUMBER" * bool(x) for n, x in NUMBERS.items())])
    raise ValueError(f"no loss is called {short!r}; use one of {known}.")
