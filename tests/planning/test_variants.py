"""What the plan compares a config with."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.variants import variants
from cwcl_jax.reproduction.runs import load_experiment


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_lower_precision_is_offered_where_there_is_a_lower_one(precision):
    config = load_experiment("configs/features_cwcl.py")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, precision=precision))
    planner = Planner(CHIPS["v5e"], jax.devices()[:1])
    names = [name for name, _ in variants(planner.estimate(config), planner)]
    assert ("loss.precision=default" in names) == (precision != "default")


def test_products_of_the_loss_take_as_many_passes_as_their_precision():
    """A TPU's float32 is one, three or six bfloat16 passes; a GPU's TF32, or none."""
    config = load_experiment("configs/features_cwcl.py")
    compute = {}
    for name in ("v5e", "a100-80"):
        planner = Planner(CHIPS[name], jax.devices()[:1])
        for precision in ("default", "high", "highest"):
            loss = dataclasses.replace(config.loss, precision=precision)
            estimate = planner.estimate(dataclasses.replace(config, loss=loss))
            compute[name, precision] = estimate.times.compute
    assert compute["v5e", "default"] < compute["v5e", "high"] < compute["v5e", "highest"]
    assert compute["a100-80", "default"] == pytest.approx(compute["a100-80", "high"])
    assert compute["a100-80", "high"] < compute["a100-80", "highest"]
