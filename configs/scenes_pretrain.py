"""Pretrains both towers on scenes: the source of the locked image tower in the package.

    python -m cwcl_jax.train --config=configs/scenes_pretrain.py --workdir=runs/scenes_pretrain
    python -m cwcl_jax.export --source=runs/scenes_pretrain --format=npz \\
        --output=cwcl_jax/assets/scenes_vit.npz
"""

from ml_collections import ConfigDict

from cwcl_jax.config import defaults
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.models.tower import TowerConfig


def get_config(argument: str = "") -> ConfigDict:
    del argument
    config = defaults(name="scenes_pretrain", total_steps=1500, global_batch_size=256)

    config.data.train = "scenes:train"

    # No head on the image tower: its features must be the embedding that is shipped.
    config.embed_dim = 96
    config.towers.image = defaults(TowerConfig, encoder="vit", preset="tiny", head="none")
    config.towers.text = defaults(TowerConfig, encoder="text", preset="tiny")

    config.loss.name = "contrastive"
    config.loss.weights_from = "image"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 1e-2

    for task in ("shape", "colour", "combination"):
        config.evaluation.tasks[task] = defaults(
            TaskConfig, source=f"scenes:test?task={task}&n=1000", template_counts=(1, 5, 10)
        )
    config.evaluation.every_steps = 500
    config.checkpoint.every_steps = 250
    return config
