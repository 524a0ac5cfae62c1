"""Patches that a training step leaves out: which, for whom, and never in evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cwcl_jax.config import ConfigError
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.vit import drop_patches
from cwcl_jax.training import sharding
from cwcl_jax.training.checks import check_patch_dropout
from cwcl_jax.training.state import make_blueprint
from tests.models.builders import filled
from tests.models.test_towers import abstract_two, images, towers
from tests.training.toy import toy_config

# The value tells example and place: 100 * example + place, in every channel.
PLACES = (100.0 * jnp.arange(8)[:, None] + jnp.arange(10)[None, :])[:, :, None] * jnp.ones(
    (1, 1, 2)
)


@pytest.mark.parametrize(("share", "first", "kept"), [(0.4, 1, 5), (0.75, 0, 2), (0.99, 1, 1)])
def test_the_class_token_and_distinct_patches_of_each_example_stay(share, first, kept):
    x = np.asarray(drop_patches(PLACES, share, jax.random.key(0), first=first))
    assert x.shape == (8, first + kept, 2)
    np.testing.assert_array_equal(x[:, :first], PLACES[:, :first])
    places = x[:, first:, 0] - 100 * np.arange(8)[:, None]
    drawn = [frozenset(row) for row in places.tolist()]
    assert all(len(row) == kept and row <= set(range(first, 10)) for row in drawn)
    assert len(set(drawn)) > 1


def test_every_patch_is_as_likely():
    draw = jax.vmap(lambda key: drop_patches(PLACES[:1], 0.75, key, first=1)[0, 1:, 0])
    places = np.asarray(draw(jax.random.split(jax.random.key(1), 2000))).astype(int)
    counts = np.bincount(places.ravel(), minlength=10)
    assert counts[0] == 0
    # 2 of 9 each time: 444 of 2000 are expected, with a standard deviation of 19.
    assert np.abs(counts[1:] - 2000 * 2 / 9).max() < 90


def test_the_draw_goes_by_the_key_and_not_by_the_mesh():
    mesh = jax.make_mesh((4,), ("data",))
    drop = jax.jit(functools.partial(drop_patches, share=0.5, first=1))
    split = jax.device_put(PLACES, NamedSharding(mesh, P("data")))
    one, four, other = (
        np.asarray(drop(x, key=jax.random.key(seed)))
        for x, seed in ((PLACES, 3), (split, 3), (PLACES, 4))
    )
    np.testing.assert_array_equal(one, four)
    assert not np.array_equal(one, other)


def test_evaluation_sees_all_patches():
    overrides = towers()["image"].overrides | {"patch_size": 4}
    configs = [
        towers(image={"overrides": overrides | {"patch_dropout": share}}) for share in (0.0, 0.5)
    ]
    (plain, shapes), (dropping, _) = map(abstract_two, configs)
    plain, dropping = (x.merge(filled(shapes)).towers["image"] for x in (plain, dropping))
    key, pixels = jax.random.key(0), images()["pixels"]
    np.testing.assert_array_equal(dropping.encoder.embed(pixels), plain.encoder.embed(pixels))
    for model, tokens in ((plain, 17), (dropping, 9)):
        assert jax.eval_shape(model.encoder.embed, pixels, key).shape == (2, tokens, 16)


def test_a_locked_encoder_which_sees_all_patches_refuses_a_share():
    def checked(tune):
        changes = {"towers.image.overrides.patch_dropout": 0.5, "towers.image.tune": tune}
        config = toy_config(**changes)
        check_patch_dropout(make_blueprint(config, sharding.make_mesh(config.mesh)))

    with pytest.raises(ConfigError, match=r"overrides\.patch_dropout=0\.5 has no effect: .*locked"):
        checked("none")
    checked("lora:2")


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"patch_dropout 1\.0 is a share"):
        encoder_config("vit", "tiny", {"patch_dropout": 1.0}, "")
