"""Small models for tests, filled without compiling their initialisation."""

import jax.numpy as jnp
import numpy as np

from cwcl_jax.models.leaves import abstract_split
from cwcl_jax.models.rngs import fresh_rngs
from cwcl_jax.models.tower import Tower
from cwcl_jax.models.two_towers import build_two_towers


def filled(abstract, seed=0):
    """Leaves of an abstract module: small random numbers, ones added to scales of norms."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in abstract.items():
        values = rng.normal(size=shape.shape) * 0.2 + float(path.endswith("/scale"))
        leaves[path] = jnp.asarray(values.astype(shape.dtype))
    return leaves


def abstract_two(configs, **changes):
    """Definition and shapes of two towers."""
    options = {"embed_dim": 8, "inverse_temperature": 10.0, "logit_bias": None, "dtype": "float32"}
    options |= changes
    arrays = {name: arrays_of(config) for name, config in configs.items()}
    return abstract_split(lambda: build_two_towers(configs, arrays, **options, rngs=fresh_rngs(0)))


def two_towers(configs, **changes):
    """Definition and leaves of two towers."""
    definition, shapes = abstract_two(configs, **changes)
    return definition, filled(shapes)


def arrays_of(config):
    """What a built-in encoder must know of its inputs: only whether they are features."""
    width = config.overrides.get("width", 0)
    return {"features": ((width,), "float32")} if config.encoder == "precomputed" else {}


def abstract_tower(config, embed_dim, dtype="float32"):
    """Definition and shapes of a tower."""
    options = {"embed_dim": embed_dim, "dtype": dtype}
    return abstract_split(lambda: Tower(config, arrays_of(config), **options, rngs=fresh_rngs(0)))


def one_tower(config, embed_dim=8, dtype="float32"):
    """Definition and leaves of a tower."""
    definition, shapes = abstract_tower(config, embed_dim, dtype)
    return definition, filled(shapes)
