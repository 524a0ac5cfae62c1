"""A run small enough for tests: scenes, a locked random image tower, a one-block text tower."""

from __future__ import annotations

from typing import Any

from cwcl_jax.config import ExperimentConfig, defaults, from_config_dict
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.models.tower import TowerConfig

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "depth": 1, "heads": 2, "mlp_width": 32}
TEXT = {"vocab_size": 2048, "max_tokens": 16, "width": 32, "depth": 1, "heads": 2, "mlp_width": 32}


def toy_config(**changes: Any) -> ExperimentConfig:
    """The toy experiment with dotted fields changed, `toy_config(**{"loss.name": "contrastive"})`.

    The image tower is locked; the text tower trains.
    """
    config = defaults(name="toy", total_steps=4, global_batch_size=16, embed_dim=32)
    # Few, since a start looks at 20,000 ids and 256 examples of what it is given.
    config.data.train = "scenes:train?n=96"
    config.data.image.size = 32
    config.data.text.max_tokens = 16
    config.towers.image = defaults(
        TowerConfig, encoder="vit", overrides=VIT, tune="none", head="none"
    )
    config.towers.text = defaults(TowerConfig, encoder="text", overrides=TEXT)
    config.optimizer.weight_decay = 0.1
    config.logging.every_steps = 1
    config.logging.tensorboard = False
    config.evaluation.batch_size = 32
    config.evaluation.tasks.shape = defaults(
        Task, source="scenes:test?task=shape&n=40", bootstrap=0, top_k=(1,)
    )
    config.checkpoint.every_steps = 2
    with config.unlocked():
        for path, value in changes.items():
            config.update_from_flattened_dict({path: value})
    return from_config_dict(config)
