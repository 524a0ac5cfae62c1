"""Pretrains both towers on scenes; the package's locked image tower comes from this run.

    python -m cwcl_jax.train --config=configs/scenes_pretrain.py --workdir=runs/scenes_pretrain
    python -m cwcl_jax.export --source=runs/scenes_pretrain --format=npz \\
        --output=cwcl_jax/assets/scenes_vit.npz
"""

from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.models.tower import TowerConfig


def get_config(argument: str = "") -> ConfigDict:
    if argument:
        raise ConfigError(f"configs/scenes_pretrain.py takes no argument, got {argument!r}")
    config = defaults(name="scenes_pretrain", total_steps=5000, global_batch_size=128)

    # Half of the pictures show one object, and their captions name little but its shape and colour.
    # If other cues distinguish the pictures, shape is learnt last.
    config.data.train = "scenes:train?objects=1&detail=0.1::scenes:train"

    # The image tower has no head, because the exported embedding must be its features.
    config.embed_dim = 96
    config.towers.image = defaults(
        TowerConfig, encoder="vit", preset="tiny", head="none", pooling="mean"
    )
    config.towers.text = defaults(TowerConfig, encoder="text", preset="tiny")

    config.loss.name = "contrastive"
    config.loss.weights_from = "image"

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.multipliers = (".*/blocks/.*/kernel=1.0", ".*=0.3")
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 1e-2

    for task in ("shape", "colour", "combination"):
        config.evaluation.tasks[task] = defaults(
            Task, source=f"scenes:test?task={task}&n=1000", template_counts=(1, 5, 10)
        )
    config.evaluation.every_steps = 1000
    config.checkpoint.every_steps = 250
    return config
