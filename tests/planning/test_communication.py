"""Reckoned traffic against the collectives of the compiled step."""

from __future__ import annotations

import jax
import pytest

from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.compiled import compile_step
from cwcl_jax.planning.estimate import Planner
from tests.planning.wide import wide_config


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("gathered", {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}),
        ("ring", {"ppermute": "collective-permute"}),
    ],
)
def test_bytes_sent_are_those_of_the_compiled_program(form, names):
    # A wide embedding and a large batch, so that the loss sends more than rounding errors.
    changes = {"loss.form": form, "embed_dim": 512, "global_batch_size": 64}
    base = Planner(CHIPS["h100"], jax.devices()).estimate(wide_config(**changes))
    found = compile_step(base.blueprint, base.batch).traffic
    for ours, theirs in names.items():
        assert base.work.sent[ours] == pytest.approx(found[theirs].sent_bytes, rel=0.02)
    total = sum(kind.sent_bytes for kind in found.values())
    assert sum(base.sent.values()) == pytest.approx(total, rel=0.1)


def test_split_leaves_are_gathered_and_activations_are_not():
    """With `mesh.fsdp` the batch stays split: an all-to-all would be of activations."""
    changes = {"mesh.fsdp": 4, "global_batch_size": 64}
    base = Planner(CHIPS["h100"], jax.devices()).estimate(wide_config(**changes))
    found = compile_step(base.blueprint, base.batch).traffic
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-reduce"].sent_bytes == pytest.approx(base.sent["gradients"], rel=0.05)
    assert found["all-gather"].sent_bytes < 1.05 * (base.sent["parameters"] + base.sent["loss"])
