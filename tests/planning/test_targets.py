"""XLA's own compilers of chips that are not here; skipped where their plugins are not installed.

The test extra does not bring them (330 MB, and JAX tries them at every start): install `[plan]` in
an environment of its own and run this file there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

from cwcl_jax.plan import on_chip
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.compiled import compile_for_chip
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.report import report
from cwcl_jax.planning.targets import chip_devices
from cwcl_jax.reproduction.runs import load_experiment
from tests.planning.wide import wide_config

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
    "towers.text.overrides": BLOCKS,
    "data.text.max_tokens": 77,
}


def compiled(chip, devices, **changes):
    import jax

    config = on_chip(wide_config(**changes), CHIPS[chip])
    base = Planner(CHIPS[chip], jax.devices()[:devices]).estimate(config)
    return base, compile_for_chip(base)


def reckoned(base):
    memory = base.memory
    return memory.gradients + memory.activations + memory.attention + memory.loss


@ON_GPU
def test_memory_of_a_gpu_is_what_was_reckoned():
    """Masked text of 77 tokens in bfloat16, so with cuDNN's attention and its blind token."""
    base, found = compiled("a100-80", 4, **BIG)
    assert found.own
    memory = base.memory
    assert found.argument_bytes > memory.params + memory.locked + memory.optimizer
    assert found.temporary_bytes == pytest.approx(reckoned(base), rel=0.15)


@ON_GPU
def test_an_h100s_schedule_pays_memory_for_overlap():
    """XLA computes again early there, so that sums between devices are hidden behind it."""
    base, found = compiled("h100", 4, **BIG)
    assert reckoned(base) < found.temporary_bytes < 1.6 * reckoned(base)
    base, found = compiled("h100", 4, **BIG, accumulation_steps=4)
    assert found.temporary_bytes == pytest.approx(reckoned(base), rel=0.2)


@ON_GPU
@pytest.mark.parametrize("name", ["cwcl", "contrastive", "sigmoid"])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_dense_loss_holds_what_was_reckoned(devices, name):
    """Of features, so that the loss outweighs the towers."""
    import jax

    config = load_experiment("configs/features_cwcl.py", f"loss={name}")
    loss = dataclasses.replace(config.loss, form="dense")
    config = dataclasses.replace(config, loss=loss, global_batch_size=8192)
    chip = CHIPS["a100-80"]
    base = Planner(chip, jax.devices()[:devices]).estimate(on_chip(config, chip))
    found = compile_for_chip(base)
    assert found.own
    # The compiler fuses one array more or less, by its choice for the size.
    assert found.temporary_bytes == pytest.approx(reckoned(base), rel=0.4)


@ON_GPU
def test_left_to_itself_the_compiler_keeps_more():
    """Why `remat` is "dots" on a GPU."""
    dots = compiled("a100-80", 4, **BIG)[1].temporary_bytes
    none = compiled("a100-80", 4, **BIG, **{"towers.text.remat": "none"})[1].temporary_bytes
    assert none > 1.4 * dots


@ON_GPU
@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"mesh.fsdp": 4}])
def test_bytes_sent_between_gpus_are_those_reckoned(changes):
    base, found = compiled("a100-80", 4, **BIG, **changes)
    sent = {kind: traffic.sent_bytes for kind, traffic in found.traffic.items()}
    assert sent["all-reduce"] == pytest.approx(base.sent["gradients"], rel=0.1)
    assert set(sent) <= {"all-reduce", "all-gather", "reduce-scatter"}
    # Leaves are gathered in the type of the products, at most as often as reckoned.
    assert sum(sent.values()) <= 1.1 * sum(base.sent.values())


@ON_TPU
def test_a_tpu_compiles_the_step():
    base, found = compiled("v5e", 4, **BIG)
    assert found.own
    memory = base.memory
    assert found.argument_bytes > memory.params + memory.locked + memory.optimizer
    assert found.temporary_bytes < memory.total
    assert found.traffic["all-reduce"].sent_bytes == pytest.approx(base.sent["gradients"], rel=0.1)


@ON_TPU
def test_what_a_tpus_compiler_refuses_is_said():
    base, found = compiled("v5e", 4, **BIG | {"global_batch_size": 65_536})
    assert not found.own
    assert "RESOURCE_EXHAUSTED" in found.refused
    assert "DOES NOT FIT" in report(base, found, (), efficiency=0.5)


@ON_TPU
def test_there_are_no_slices_of_three_chips():
    assert chip_devices(CHIPS["v5e"], 3) is None


@ON_GPU
def test_more_than_a_node_comes_in_whole_nodes():
    assert len(chip_devices(CHIPS["h100"], 16) or []) == 16
    assert chip_devices(CHIPS["h100"], 12) is None


@ON_TPU
@pytest.mark.multiprocess
def test_two_plans_at_once_both_find_the_compiler():
    """libtpu lets one process at a time have a real chip."""
    code = """
import sys
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.targets import chip_devices
print(len(chip_devices(CHIPS["v5e"], 4) or ()), flush=True)
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
