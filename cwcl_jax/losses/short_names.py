"""Losses by short names, as tables and command lines write them: contrastive, relu2, exp0.1."""

from typing import Any

from cwcl_jax.losses.presets import PRESETS
from cwcl_jax.losses.weights import NUMBERS, parse_number, parse_weights


def loss_fields(short: str) -> dict[str, Any]:
    """Fields of `LossConfig` for a short name; a weight function alone means CWCL with it.

    Raises:
      ValueError: an unknown name, or a number where there is none.
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
