import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.losses import LossConfig, cwcl_loss, make_loss, reference
from tests.losses import oracle

DENSE = LossConfig(form="dense")


def dense(name, u, v, p, scale, bias=-10.0):
    loss_fn = make_loss(LossConfig(name=name, form="dense"))
    return float(loss_fn(jnp.asarray(u), jnp.asarray(v), jnp.asarray(p), np.log(scale), bias)[0])


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_an_oracle_that_loops_over_rows(scale):
    u, v, p = oracle.embeds(0, 23, 9, 5)
    with jax.enable_x64(True):
        args = (u, v, p, scale)
        assert dense("cwcl", *args) == pytest.approx(oracle.cwcl(u, v, p, scale), rel=1e-13)
        expected = oracle.contrastive(u, v, scale)
        assert dense("contrastive", *args) == pytest.approx(expected, rel=1e-13)
        expected = oracle.sigmoid(u, v, scale, -10.0)
        assert dense("sigmoid", *args) == pytest.approx(expected, rel=1e-13)


def test_the_transposed_targets_are_not_the_same_thing():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(1, 12, 6))
    weights = p @ p.T / 2 + 0.5
    targets = weights / weights.sum(axis=1, keepdims=True)
    logits = reference.pair_logits(u, v, 3.0)
    right = reference.cross_entropy(logits, targets).mean()
    wrong = reference.cross_entropy(logits, targets.T).mean()
    assert abs(float(right - wrong)) > 1e-4


def test_narrow_inputs_are_summed_in_float32():
    u, v, p = (jnp.asarray(x, jnp.bfloat16) for x in oracle.embeds(3, 16, 8))
    loss = cwcl_loss(u, v, weights_from=p, logit_scale=1.0, config=DENSE)[0]
    assert loss.dtype == jnp.float32


def test_forward_mode_works_in_the_dense_form():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(4, 8, 4))

    def loss(u):
        return cwcl_loss(u, v, weights_from=p, logit_scale=1.0, config=DENSE)[0]

    _, tangent = jax.jvp(loss, (u,), (u,))
    assert np.isfinite(tangent)
