import jax
import numpy as np
import pytest
from flax import nnx

from cwcl_jax.models.rngs import fresh_rngs


@pytest.mark.parametrize("seed", [3, "key"])
def test_keys_are_those_of_nnx_and_the_count_is_no_tracer(seed):
    seed = jax.random.key(5) if seed == "key" else seed

    def draw(make, seed):
        rngs = make(seed)
        keys = [rngs.params(), rngs(), rngs.fork().params(), rngs.dropout()]
        if make is fresh_rngs:
            assert not isinstance(rngs.default.count[...], jax.core.Tracer)
        return [jax.random.key_data(key) for key in keys]

    expected = draw(nnx.Rngs, seed)
    np.testing.assert_array_equal(draw(fresh_rngs, seed), expected)
    traced = jax.jit(lambda key: draw(fresh_rngs, seed if isinstance(seed, int) else key))
    np.testing.assert_array_equal(traced(jax.random.key(5)), expected)


def test_a_module_that_keeps_its_keys_draws_new_ones():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x)

    module = Noisy(fresh_rngs(0))
    first, second = module(np.ones(64)), module(np.ones(64))
    assert np.any(np.asarray(first) != np.asarray(second))
