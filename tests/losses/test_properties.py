"""What holds for any embeds."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwcl_jax.losses import LossConfig, contrastive_loss, cwcl_loss, make_loss
from tests.losses import oracle

# One shape for all examples: a new one costs a compilation.
N, D = 12, 5
seeds = st.integers(0, 2**16)
few = settings(max_examples=8)


def arrays(seed):
    return tuple(jnp.asarray(x, jnp.float32) for x in oracle.embeds(seed, N, D))


@cache
def compiled(**options):
    """The loss of u, v and p; every example calls the same program."""
    loss_fn = make_loss(LossConfig(diagnostics=False, block_size=5, **options))
    return jax.jit(lambda u, v, p: loss_fn(u, v, p, 2.0)[0])


@jax.jit
def value_of_targets(u, v, targets):
    return cwcl_loss(u, v, targets=targets, logit_scale=2.0)[0]


@jax.jit
def diagnostics(u, v, p):
    return cwcl_loss(u, v, weights_from=p, logit_scale=2.0)[1]


@jax.jit
def identity_and_infonce(u, v):
    targets = jnp.eye(N, dtype=jnp.float32)
    config = LossConfig(weighted="both", block_size=5)
    ours, _ = cwcl_loss(u, v, targets=targets, logit_scale=2.0, config=config)
    plain, _ = contrastive_loss(u, v, logit_scale=2.0, config=LossConfig(block_size=5))
    return ours, plain


def loss(u, v, p, **options):
    return float(compiled(**options)(u, v, p))


@few
@given(seeds)
def test_the_order_of_the_pairs_does_not_matter(seed):
    u, v, p = arrays(seed)
    order = np.random.default_rng(seed).permutation(N)
    assert loss(u[order], v[order], p[order]) == pytest.approx(loss(u, v, p), rel=1e-5)


@few
@given(seeds)
def test_a_rotation_of_the_space_does_not_matter(seed):
    u, v, p = arrays(seed)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0].astype(np.float32)
    assert loss(u @ q, v @ q, p) == pytest.approx(loss(u, v, p), rel=1e-5)


@few
@given(seeds)
def test_identity_weights_reduce_to_infonce(seed):
    u, v, _ = arrays(seed)
    ours, plain = identity_and_infonce(u, v)
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)


@few
@given(seeds)
def test_equal_weights_are_the_uniform_target(seed):
    u, v, p = arrays(seed)
    same = jnp.tile(p[:1], (N, 1))  # identical locked embeds: all weights are 1
    uniform = loss(u, v, p, weight_function="uniform")
    assert loss(u, v, same) == pytest.approx(uniform, rel=1e-5)


@few
@given(seeds)
def test_the_scale_of_targets_does_not_matter_but_transposing_does(seed):
    u, v, _ = arrays(seed)
    targets = jnp.asarray(np.random.default_rng(seed).random((N, N)), jnp.float32)

    value, scaled, transposed = (
        float(value_of_targets(u, v, t)) for t in (targets, 7 * targets, targets.T)
    )
    assert scaled == pytest.approx(value, rel=1e-5)
    assert abs(transposed - value) > 1e-4


@few
@given(seeds)
def test_the_loss_is_at_least_the_entropy_of_the_targets(seed):
    u, v, p = arrays(seed)
    d = diagnostics(u, v, p)
    assert float(d["excess"]) > -1e-5
    assert float(d["loss_v_to_u"]) > 0


@few
@given(seeds)
def test_a_batch_repeated_twice_adds_log_two_to_uniform_targets(seed):
    u, v, p = arrays(seed)
    options = {"weight_function": "uniform", "direction_weights": (1.0, 0.0)}
    once = loss(u, v, p, **options)
    twice = loss(*(jnp.concatenate([x, x]) for x in (u, v, p)), **options)
    assert twice == pytest.approx(once + np.log(2), rel=1e-5)
