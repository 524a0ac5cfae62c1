"""Attention's tokens x tokens arrays are told from others, also where a head is as wide as they."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cwcl_jax.models.attention import attend
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.memory import state_bytes
from cwcl_jax.planning.scores import is_scores
from cwcl_jax.planning.towers import tower_needs
from cwcl_jax.planning.work import count_work
from tests.planning.wide import TEXT, VIT, wide_config

BATCH, HEADS, WIDTH = 2, 3, 8  # of a head


def test_scores_are_recognised_with_and_without_an_axis_of_one():
    assert is_scores((2, 8, 77, 77))
    assert is_scores((1, 8, 77, 1, 77))
    assert not is_scores((2, 77, 768))
    assert not is_scores((2, 8, 64, 77))


@pytest.mark.parametrize("tokens", [WIDTH - 1, WIDTH, WIDTH + 1])
def test_six_products_of_attention_touch_one_array_of_scores_each(tokens):
    def gradients(*arrays):
        return jax.grad(
            lambda q, k, v: jnp.sum(attend(q, k, v, None, causal=False, implementation="xla")),
            (0, 1, 2),
        )(*arrays)

    array = jax.ShapeDtypeStruct((BATCH, tokens, HEADS, WIDTH), jnp.float32)
    work = count_work(gradients, array, array, array, devices=1)
    assert dict(work.score_bytes) == {tokens: 6 * 4 * BATCH * HEADS * tokens**2}


def text_of(tokens, **changes):
    # TEXT has heads of 64.
    overrides = TEXT | {"max_tokens": tokens}
    return wide_config(
        **{"towers.text.overrides": overrides, "data.text.max_tokens": tokens} | changes
    )


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_a_tower_keeps_grows_evenly_with_its_tokens(remat):
    changes = {"dtype": "bfloat16", "towers.text.remat": remat}
    few, equal, more = (
        tower_needs(text_of(tokens, **changes), "text", ()) for tokens in (63, 64, 65)
    )
    assert equal.kept == pytest.approx((few.kept + more.kept) / 2, rel=1e-3)
    assert equal.kept_scores == pytest.approx((few.kept_scores + more.kept_scores) / 2, rel=1e-3)


@pytest.mark.parametrize("tokens", [16, 17])
def test_scores_of_fused_towers_are_touched_by_no_product(tokens):
    """17 patches and as many tokens of text, or fewer: each tower's scores once."""
    changes = {"dtype": "bfloat16", "towers.image.overrides": VIT | {"depth": 3}}
    base = Planner(CHIPS["h100"], jax.devices()).estimate(text_of(tokens, **changes))
    assert set(base.work.score_bytes) == {tokens, 17}
    # In half precision all of them: what is left in float32 is the loss.
    assert base.work.flops["single"] > 0
    assert set(base.flops) == {"half", "highest"}
    assert sum(base.flops.values()) == pytest.approx(base.work.total_flops, rel=1e-9)
    touched = base.work.product_bytes - sum(base.work.score_bytes.values())
    touched += 7 * base.state.params + state_bytes(jax.tree.leaves(base.batch))
    assert base.times.memory * base.chip.bandwidth == pytest.approx(touched, rel=1e-9)
