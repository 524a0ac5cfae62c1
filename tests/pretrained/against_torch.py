"""What tests of imported towers share: random models of transformers, and their towers here.

The references are tiny, random, and saved by transformers itself; nothing is downloaded.
"""

import jax
import numpy as np
import pytest

from cwcl_jax.models.leaves import abstract_split
from cwcl_jax.models.rngs import fresh_rngs
from cwcl_jax.models.tower import Tower, TowerConfig
from cwcl_jax.pretrained import complete, import_tower

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIFFERENCES: dict[str, float] = {}


def saved(model, folder, seed=0):
    """The model with random biases and norms, saved by transformers, in float32 and for use."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return model


def abstract(config, embed_dim):
    """Definition and shapes of a tower with the settings of its folder."""
    options = {"embed_dim": embed_dim, "dtype": "float32"}
    return abstract_split(lambda: Tower(config, {}, **options, rngs=fresh_rngs(0)))


def imported(encoder, folder, width, **changes):
    """The tower with a folder's own settings and weights, and the import's account."""
    config = complete(TowerConfig(encoder, weights=str(folder), head="none", **changes))
    definition, shapes = abstract(config, width)
    result = import_tower(config, "x", {f"towers/x/{p}": leaf for p, leaf in shapes.items()})
    leaves = {path.removeprefix("towers/x/"): leaf for path, leaf in result.leaves.items()}
    assert leaves.keys() == shapes.keys()
    return definition.merge(leaves), result


def close(name, ours, theirs, atol=1e-5):
    """Compares, and keeps the largest difference of `name`."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    largest = float(np.abs(ours - theirs).max())
    DIFFERENCES[name] = max(DIFFERENCES.get(name, 0.0), largest)
    print(f"{name}: {largest:.1e} of {np.abs(theirs).max():.2f}")
    np.testing.assert_allclose(ours, theirs, atol=atol)


def jitted(function, *arguments):
    """One compilation for all that a test compares."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def unit(x):
    x = x.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
