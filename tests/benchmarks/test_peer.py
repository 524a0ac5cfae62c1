"""The race with PyTorch is between towers of the same shapes."""

import dataclasses

import pytest
from torch import nn

from cwcl_jax.benchmarks import peer, torch_towers
from cwcl_jax.config import ConfigError
from cwcl_jax.training import sharding
from cwcl_jax.training.state import make_blueprint


def small():
    config = peer.default_experiment()
    sizes = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
    towers = {
        name: dataclasses.replace(tower, overrides=tower.overrides | sizes)
        for name, tower in config.towers.items()
    }
    return dataclasses.replace(config, towers=towers, global_batch_size=8, embed_dim=8)


@pytest.mark.slow
def test_every_part_is_timed_in_both():
    """Slow: a benchmark; its parts are compared with the towers below."""
    rows = peer.race(small(), 1)
    assert [row["part"] for row in rows][-1] == "step"
    assert all(row["seconds"] > 0 and row["torch_seconds"] > 0 for row in rows)


def test_as_many_weights_as_ours():
    config = small()
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    twins = {"image": torch_towers.Vit, "text": torch_towers.Text}
    for name, twin in twins.items():
        ours = {
            path: leaf.size
            for path, leaf in (blueprint.abstract_params | blueprint.abstract_locked).items()
            if path.startswith(f"towers/{name}/encoder/")
        }
        module: nn.Module = twin(config.towers[name].encoder_settings())
        assert sum(p.numel() for p in module.parameters()) == sum(ours.values())


def test_other_towers_are_refused():
    config = small()
    bert = dataclasses.replace(config.towers["text"], encoder="bert", overrides={})
    config = dataclasses.replace(config, towers=config.towers | {"text": bert})
    with pytest.raises(ConfigError, match="text=text, not"):
        peer.race(config, 1)
