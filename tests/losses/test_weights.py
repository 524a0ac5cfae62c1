import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.losses import LossConfig, cwcl_loss, weights
from tests.losses import oracle


def locked(n, seed=0):
    return jnp.asarray(oracle.embeds(seed, n, 24)[2], jnp.float32)


def diagnostics(p, **options):
    u, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(1, len(p), 8))
    return cwcl_loss(u, v, weights_from=p, logit_scale=2.0, config=LossConfig(**options))[1]


@pytest.mark.parametrize("function", ["calibrated", "calibrated_relu"])
def test_a_calibrated_kernel_keeps_the_diagonal_whatever_the_batch(function):
    for n in (16, 96):
        d = diagnostics(locked(n), weight_function=function, target_diagonal=0.4)
        assert float(d["diagonal_weight"]) == pytest.approx(0.4, rel=1e-4)


def test_a_fixed_kernel_flattens_as_the_batch_grows():
    shares = [
        float(diagnostics(locked(n), weight_function="relu")["diagonal_weight"]) for n in (16, 96)
    ]
    assert shares[1] < 0.6 * shares[0]


def test_a_kernel_can_keep_the_effective_number_of_positives():
    d = diagnostics(locked(96), weight_function="calibrated", target_positives=5.0)
    assert float(d["effective_positives"]) == pytest.approx(5, rel=1e-4)


def test_a_sample_of_rows_calibrates_a_large_batch():
    options = {"weight_function": "calibrated", "target_diagonal": 0.3}
    d = diagnostics(locked(384), sampled_rows=48, **options)
    assert float(d["diagonal_weight"]) == pytest.approx(0.3, abs=0.05)


def test_centred_embeds_have_no_mean_and_unit_norm():
    centred = np.asarray(weights.centre(locked(40) + 1.0))
    np.testing.assert_allclose(np.linalg.norm(centred, axis=1), 1, rtol=1e-5)
    assert np.abs(centred.mean(axis=0)).max() < 0.1


def test_a_function_that_is_not_entry_by_entry_is_an_error():
    with pytest.raises(ValueError, match="must work entry by entry"):
        weights.UserFunction(lambda c: c.sum(axis=1))(jnp.ones((2, 2)), 1.0)
