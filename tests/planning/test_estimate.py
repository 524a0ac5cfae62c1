"""Estimates against a step that ran, and the search for the largest batch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.compiled import compile_step, largest_batch
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.inputs import device_bytes
from cwcl_jax.planning.report import report
from cwcl_jax.planning.variants import variants
from cwcl_jax.reproduction.runs import load_experiment
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import initialise
from cwcl_jax.training.step import TrainStep
from tests.planning.wide import wide_config


def estimate(config, chip="a100-80", devices=4):
    return Planner(CHIPS[chip], devices, compile_step=False).estimate(config)


def on_first_device(tree):
    """Bytes that real arrays occupy there."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_memory_is_that_of_a_step_that_ran():
    """The compiler's own figures are of the program that runs; the state is what lies there."""
    base = estimate(dataclasses.replace(wide_config(), mesh=MeshConfig(fsdp=4)))
    compiled = compile_step(base.blueprint, base.batch)
    state, locked, _ = initialise(base.blueprint)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), base.batch)
    batch = sharding.put_batch(base.blueprint.mesh, batch)
    state, _ = TrainStep(base.blueprint)(state, locked, batch)
    assert sum(base.state.values()) == pytest.approx(on_first_device((state, locked)), abs=16)
    assert device_bytes(jax.tree.leaves(base.batch)) == on_first_device(batch)
    assert compiled.arguments == pytest.approx(on_first_device((state, locked, batch)), abs=16)
    assert set(compiled.traffic) == {"all-gather", "all-reduce", "reduce-scatter"}


def test_fsdp_splits_the_state():
    whole, split = (
        estimate(dataclasses.replace(wide_config(), mesh=MeshConfig(fsdp=fsdp))).state
        for fsdp in (1, 4)
    )
    # Small leaves (biases, norms) stay whole on every device.
    assert split["optimizer state"] == pytest.approx(whole["optimizer state"] / 4, rel=0.1)


@pytest.mark.parametrize("start", [8, 80, 800])
@pytest.mark.parametrize("each", [7, 90])
def test_the_largest_batch_is_found_in_four_compilations(start, each):
    """Memory with a kink, as where the loss takes another form."""
    asked = []

    def need(size):
        asked.append(size)
        return 10_000 + each * size + max(0, size - 300) * each / 2

    found = largest_batch(need, start, need(start), step=4, limit=50_000)
    assert len(asked) <= 5
    assert found % 4 == 0
    assert 0.95 * 50_000 < need(found) <= 50_000


def test_a_batch_that_the_compiler_refuses_is_too_large():
    found = largest_batch(
        lambda size: size * 10.0 if size <= 500 else float("inf"), 1000, float("inf"),
        step=8, limit=4000,
    )  # fmt: skip
    assert 0 < found <= 400


def test_no_batch_fits_beside_too_large_a_state():
    assert largest_batch(lambda size: 100.0 + size, 64, 164.0, step=8, limit=50) == 0


def test_products_of_the_loss_take_as_many_passes_as_their_precision():
    """A TPU's float32 is one, three or six bfloat16 passes; a GPU's one or three of TF32."""
    config = load_experiment("configs/features_cwcl.py")
    compute = {}
    for chip in ("v5e", "a100-80"):
        for precision in ("default", "high", "highest"):
            loss = dataclasses.replace(config.loss, precision=precision)
            changed = dataclasses.replace(config, loss=loss)
            compute[chip, precision] = estimate(changed, chip, 1).times.compute
    for chip in ("v5e", "a100-80"):
        assert compute[chip, "default"] < compute[chip, "high"] < compute[chip, "highest"]


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_lower_precision_is_offered_where_there_is_a_lower_one(precision):
    config = load_experiment("configs/features_cwcl.py")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, precision=precision))
    planner = Planner(CHIPS["v5e"], 1, compile_step=False)
    names = [name for name, _ in variants(planner.estimate(config), planner)]
    assert ("loss.precision=default" in names) == (precision != "default")


def test_attention_is_fused_in_half_precision_on_chips_that_have_the_kernel():
    """Decided by the model's own rule, as it would be there."""
    for chip, dtype, fused in (
        ("a100-80", "bfloat16", True),
        ("a100-80", "float32", False),
        ("v5e", "bfloat16", False),
    ):
        work = estimate(wide_config(dtype=dtype), chip).work
        assert bool(work.fused_attentions) == fused


def test_too_small_a_process_is_an_error():
    with pytest.raises(ConfigError, match="has 4 devices, not 8"):
        Planner(CHIPS["h100"], 8, compile_step=False)


def test_the_plan_says_how_many_cores_a_device_needs():
    config = wide_config()
    found = report(estimate(config, "h100", 2), efficiency=0.5)
    (line,) = (line for line in found.splitlines() if line.startswith("input at 50%"))
    seconds = estimate(config, "h100", 2).times.roofline / 0.5
    rate = config.global_batch_size / seconds / 2
    assert f"{rate:,.0f} examples/s for each device" in line
    assert f"{rate * 0.0024:,.1f} cores" in line
    features = load_experiment("configs/features_cwcl.py")
    assert "input at" not in report(estimate(features, "h100", 1), efficiency=0.5)
