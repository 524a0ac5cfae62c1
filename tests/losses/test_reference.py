import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.losses import reference
from tests.losses import oracle


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_an_oracle_that_loops_over_rows(scale):
    u, v, p = oracle.embeds(0, 23, 9, 5)
    with jax.enable_x64(True):
        logit_scale = np.log(scale)
        two = reference.cwcl(*map(jnp.asarray, (u, v, p)), logit_scale)
        assert sum(two) == pytest.approx(oracle.cwcl(u, v, p, scale), rel=1e-13)
        two = reference.contrastive(jnp.asarray(u), jnp.asarray(v), logit_scale)
        assert sum(two) == pytest.approx(oracle.contrastive(u, v, scale), rel=1e-13)
        one = reference.sigmoid(jnp.asarray(u), jnp.asarray(v), logit_scale, -10.0)
        assert one == pytest.approx(oracle.sigmoid(u, v, scale, -10.0), rel=1e-13)


def test_the_transposed_targets_are_not_the_same_thing():
    u, v, p = oracle.embeds(1, 12, 6)
    with jax.enable_x64(True):
        targets = reference.soft_targets(reference.similarity_weights(jnp.asarray(p)))
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-14)
        assert float(jnp.abs(targets - targets.T).max()) > 1e-4
        logits = reference.pair_logits(jnp.asarray(u), jnp.asarray(v), 3.0)
        right = reference.soft_cross_entropy(logits, targets)
        wrong = reference.soft_cross_entropy(logits, targets.T)
        assert abs(float(right - wrong)) > 1e-4


def test_the_loss_is_bounded_below_by_the_entropy_of_the_targets():
    u, v, p = oracle.embeds(2, 40, 16)
    u_to_v, _ = reference.cwcl(*(jnp.asarray(x, jnp.float32) for x in (u, v, p)), 2.0)
    assert float(u_to_v) > oracle.entropy(p @ p.T / 2 + 0.5)


def test_narrow_inputs_are_summed_in_float32():
    u, v, p = (jnp.asarray(x, jnp.bfloat16) for x in oracle.embeds(3, 16, 8))
    assert reference.cwcl(u, v, p, 1.0)[0].dtype == jnp.float32


def test_forward_mode_works_in_the_dense_form():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(4, 8, 4))
    _, tangent = jax.jvp(lambda u: reference.cwcl(u, v, p, 1.0)[0], (u,), (u,))
    assert np.isfinite(tangent)
