"""float32 means float32 unless a config says otherwise: read from the traced programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.estimate import step_work
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.planning.targets import as_on
from cwcl_jax.training import sharding
from cwcl_jax.training.state import make_blueprint
from tests.losses import oracle
from tests.planning.wide import wide_config


def products(chip, **changes):
    """Flops of a step by precision, as it is traced on a chip."""
    config = wide_config(**changes)
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    with as_on(CHIPS[chip]):
        return step_work(blueprint, abstract_batch(blueprint)).flops


@pytest.mark.parametrize("chip", ["h100", "v5e"])
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"highest"}),
        ({"precision": "high", "loss.precision": "high"}, {"highest", "high"}),
        ({"precision": "default"}, {"single", "highest"}),
        ({"towers.text.precision": "default"}, {"single", "highest"}),
        ({"dtype": "bfloat16", "loss.precision": "bfloat16"}, {"half", "highest"}),
    ],
    ids=["float32", "three passes", "one pass", "one tower", "bfloat16"],
)
def test_products_are_as_exact_as_the_config_says(chip, changes, names):
    found = products(chip, **changes)
    # JAX's own attention pulls float32 scores back through bfloat16 keys in one pass.
    mixed = {"single"} if "half" in names and chip == "v5e" else set()
    assert set(found) == names | mixed
    if names != {"highest"}:  # what is left of it is the loss, or its closed form
        rest = "high" if "high" in names else "half" if "half" in names else "single"
        assert found[rest] > 0.9 * sum(found.values()) or "towers.text.precision" in changes


@pytest.mark.parametrize("where", ["precision", "towers.text.precision"])
def test_an_unknown_precision_is_refused(where):
    with pytest.raises(
        ConfigError, match=r"precision: 'tf32' is not one of highest, high, default"
    ):
        wide_config(**{where: "tf32"})


def test_bfloat16_products_of_float32_embeds_stay_near():
    """Eight bits of each product, times the inverse temperature; sums are float32."""
    u, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 64, 32))

    def loss(precision):
        function = make_loss(LossConfig(form="fused", precision=precision, diagnostics=False))
        return jax.value_and_grad(lambda v: function(u, v, u, jnp.log(20.0))[0])(v)

    (exact, gradient), (value, rounded) = loss("highest"), loss("bfloat16")
    assert gradient.dtype == rounded.dtype == jnp.float32
    assert 0 < abs(value - exact) < 5e-3 * exact
    error = np.linalg.norm(rounded - gradient) / np.linalg.norm(gradient)
    assert 1e-5 < error < 2e-2
