"""Whether the data's inputs fit the towers, found out before anything is computed."""

from __future__ import annotations

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.losses.options import resolve


def check_inputs(config: ExperimentConfig) -> None:
    """Raises ConfigError where the data cannot feed the towers or the loss."""
    loss = resolve(config.loss)
    if loss.needs_labels and not config.data.labels:
        raise ConfigError(
            f"config.loss.name={config.loss.name!r}, weight_function={loss.weights.text!r}, "
            f"duplicates={loss.duplicates!r} needs labels: set --config.data.labels=class (the "
            "source's classes) or =text (pairs with equal captions)"
        )
    for name, tower in config.towers.items():
        settings = tower.encoder_settings()
        try:
            config.data.inputs_of(name).check(
                settings,
                options=f"config.data.{name}",
                overrides=f"config.towers.{name}.overrides",
                imported=bool(tower.weights),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
