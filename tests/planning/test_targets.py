"""XLA's own compilers of chips that are not here; skipped where their plugins are not installed.

The test extra does not bring them (330 MB, and JAX tries them at every start): install `[plan]` in
an environment of its own and run this file there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.collectives import executions
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.inputs import device_bytes
from cwcl_jax.planning.report import report
from cwcl_jax.planning.targets import NoCompiler, as_on, chip_devices, compiler_options
from tests.planning.wide import VIT, wide_config

ON_GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax-cuda12-plugin"
)
ON_TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
# Blocks as wide as a text tower B: with narrow ones, XLA keeps more that it could compute again.
BLOCKS = {"vocab_size": 512, "max_tokens": 77, "width": 768, "depth": 4, "heads": 12,
          "mlp_width": 3072}  # fmt: skip
BIG = {
    "global_batch_size": 1024,
    "dtype": "bfloat16",
    "towers.image.overrides": VIT | {"depth": 2},
    "towers.text.overrides": BLOCKS,
    "data.text.max_tokens": 77,
}


def compiled(chip, devices, **changes):
    return Planner(CHIPS[chip], devices).estimate(wide_config(**changes))


def trained_bytes(base):
    return device_bytes(base.blueprint.abstract_params.values())


@ON_GPU
@pytest.mark.parametrize(("chip", "most"), [("a100-80", 1.2), ("h100", 1.6)])
def test_a_gpu_compiles_the_step_with_its_own_attention(chip, most):
    """Masked text of 77 tokens in bfloat16, so with cuDNN's attention and its blind token."""
    base = compiled(chip, 4, **BIG)
    found = base.compiled
    batch = device_bytes(base.batch[m][name] for m in base.batch for name in base.batch[m])
    assert found.arguments == pytest.approx(sum(base.state.values()) + batch, rel=0.01)
    assert base.work.fused_attentions == BLOCKS["depth"] + BIG["towers.image.overrides"]["depth"]
    # Korthikanti et al. 2022, section 4.1: 34 bytes per token and width in a block. What is
    # elementwise is not kept but computed again: on an H100 early, to hide sums between devices.
    tokens = BIG["global_batch_size"] // 4 * BLOCKS["max_tokens"]
    published = 34 * tokens * BLOCKS["width"] * BLOCKS["depth"]
    assert 0.3 * published < found.temporary < most * published


@ON_GPU
def test_left_to_itself_the_compiler_keeps_more():
    """Why `remat` is "dots" on a GPU."""
    dots = compiled("a100-80", 4, **BIG).compiled.temporary
    none = compiled("a100-80", 4, **BIG, **{"towers.text.remat": "none"}).compiled.temporary
    assert none > 1.4 * dots


@ON_GPU
@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"mesh.fsdp": 4}])
def test_gradients_are_sent_once_between_gpus(changes):
    """Also of an accumulated batch: the sum over devices moves out of the loop over chunks."""
    base = compiled("a100-80", 4, **BIG, **changes)
    sent = {kind: traffic.sent_bytes for kind, traffic in base.compiled.traffic.items()}
    assert set(sent) <= {"all-reduce", "all-gather", "reduce-scatter"}
    if not base.blueprint.config.mesh.fsdp > 1:
        whole = 2 * 3 / 4 * trained_bytes(base)
        assert (
            0.95 * whole < sent["all-reduce"] < 1.1 * whole
        )  # in float32, also of bfloat16 towers


@ON_GPU
def test_the_largest_batch_fits_and_a_little_more_does_not():
    planner = Planner(dataclasses.replace(CHIPS["a100-80"], memory=4 * 10**9), 1)
    small = {"towers.text.overrides": BLOCKS | {"depth": 1}, "global_batch_size": 64}
    base = planner.estimate(wide_config(**BIG | small))
    largest = planner.largest_batch(base)
    config = base.blueprint.config
    below, above = (
        planner.estimate(dataclasses.replace(config, global_batch_size=size)).bytes
        for size in (largest, round(1.04 * largest))
    )
    assert below <= base.limit < above


OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param("h100", OVERLAP, marks=ON_GPU), pytest.param("v5p", {}, marks=ON_TPU)],
)
def test_the_rings_hops_run_beside_the_tiles(name, options):
    """Of columns, and of their gradient: each starts before the loop over tiles and ends after."""
    chip = CHIPS[name]
    mesh = jax.sharding.Mesh(
        np.array(chip_devices(chip, 4)), ("data",), axis_types=(AxisType.Auto,)
    )
    function = make_loss(LossConfig(form="ring", diagnostics=False), mesh=mesh)

    def loss(u, v):
        return function(u, v, jax.lax.stop_gradient(u), jnp.float32(2.66))[0]

    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((32_768, 768), jnp.bfloat16, sharding=split)
    with as_on(chip):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, x)
        text = lowered.compile(compiler_options(chip) | options).as_text()
    seen = []
    for lines, _ in executions(text):
        for kind in ("bf16", "f32"):
            array = rf"{kind}\[8192,768\]"
            start = [
                i for i, x in enumerate(lines) if re.search(rf"= \(+{array}.*permute-start\(", x)
            ]
            tiles = [i for i, x in enumerate(lines) if " while(" in x]
            done = [
                i for i, x in enumerate(lines) if re.search(rf"= \(?{array}.*permute-done\(", x)
            ]
            if start and tiles and len(lines) < 200 and "ENTRY" not in lines[0]:
                seen.append(start[0] < tiles[-1] < done[0])
    assert len(seen) >= 3
    assert seen.count(False) <= 1  # the last hop of the gradient, after all tiles


@ON_TPU
def test_a_tpu_compiles_the_step():
    base = compiled("v5e", 4, **BIG)
    assert base.compiled.arguments > sum(base.state.values())
    assert base.compiled.traffic["all-reduce"].sent_bytes > 0.7 * trained_bytes(base)
    assert "temporary, says XLA for v5e" in report(base, efficiency=0.5)


@ON_TPU
def test_what_a_tpus_compiler_refuses_is_said():
    base = compiled("v5e", 4, **BIG | {"global_batch_size": 65_536})
    assert base.compiled is None
    assert "RESOURCE_EXHAUSTED" in base.refused
    assert "DOES NOT FIT" in report(base, efficiency=0.5)


@ON_TPU
def test_there_are_no_slices_of_three_chips():
    with pytest.raises(NoCompiler, match="slices have 1, 4, 8"):
        chip_devices(CHIPS["v5e"], 3)


@ON_GPU
def test_more_than_a_node_comes_in_whole_nodes():
    assert len(chip_devices(CHIPS["h100"], 16)) == 16
    with pytest.raises(NoCompiler, match="whole nodes of 8"):
        chip_devices(CHIPS["h100"], 12)


def test_a_missing_compiler_is_named():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        with pytest.raises(NoCompiler, match=r"pip install 'cwcl_jax\[plan\]'"):
            chip_devices(CHIPS["h100"], 4)


@ON_TPU
@pytest.mark.multiprocess
def test_two_plans_at_once_both_find_the_compiler():
    """libtpu lets one process at a time have a real chip."""
    code = """
import sys
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.targets import chip_devices
print(len(chip_devices(CHIPS["v5e"], 4)), flush=True)
sys.stdin.read()
"""
    environ = {k: v for k, v in os.environ.items() if k != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    environ["JAX_PLATFORMS"] = "cpu"
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(2):
            child = subprocess.Popen(
                ["timeout", "-s", "KILL", "120", sys.executable, "-c", code],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            assert child.stdout is not None
            found.append(child.stdout.readline().strip())  # the first still runs then
    assert found == ["4", "4"]
