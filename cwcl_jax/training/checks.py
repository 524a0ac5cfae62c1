"""Whether the data's inputs fit the towers, found out before anything is computed."""

from __future__ import annotations

from typing import Any

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.text import load_tokenizer
from cwcl_jax.losses.options import resolve
from cwcl_jax.models.encoders import encoder_config


def check_inputs(config: ExperimentConfig) -> None:
    """Raises ConfigError where the data cannot feed the towers or the loss."""
    loss = resolve(config.loss)
    if loss.needs_labels and not config.data.labels:
        raise ConfigError(
            f"config.loss.name={config.loss.name!r}, weight_function={loss.weights.text!r}, "
            f"duplicates={loss.duplicates!r} needs labels: set --config.data.labels=class (the "
            "source's classes) or =text (pairs with equal captions)"
        )
    for modality, tower in config.towers.items():
        settings = encoder_config(tower.encoder, tower.preset, tower.overrides, tower.pooling)
        option = f"config.towers.{modality}.overrides"
        if hasattr(settings, "image_size"):
            _check_image_size(config, settings.image_size, option)
        if hasattr(settings, "vocab_size"):
            _check_text(config, settings, option, imported=bool(tower.weights))


def _check_image_size(config: ExperimentConfig, expected: int, option: str) -> None:
    size = config.data.image.size
    if size != expected:
        raise ConfigError(
            f"config.data.image.size={size}, but the tower reads {expected} x {expected}: set "
            f"--config.data.image.size={expected}, or image_size={size} in {option} (an imported "
            "position grid is resampled)"
        )


def _check_text(config: ExperimentConfig, settings: Any, option: str, *, imported: bool) -> None:
    text = config.data.text
    if text.max_tokens > settings.max_tokens:
        raise ConfigError(
            f"config.data.text.max_tokens={text.max_tokens} exceeds the {settings.max_tokens} "
            f"positions of the text tower: lower it, or raise max_tokens in {option}"
        )
    try:
        size = load_tokenizer(text).vocab_size
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # An id beyond the table would be clamped to its last row without a word; far fewer ids than
    # a pretrained table has rows mean another tokenizer, whose ids stand for other words.
    if size > settings.vocab_size or (imported and size < settings.vocab_size // 2):
        raise ConfigError(
            f"the tokenizer config.data.text.tokenizer={text.tokenizer!r} has {size} tokens, the "
            f"text tower's table {settings.vocab_size}: they do not belong together; name the "
            f"tower's own tokenizer, or set vocab_size={size} in {option} for one from scratch"
        )
