"""A small step in which matrix products and activations outweigh everything else."""

from __future__ import annotations

from typing import Any

from cwcl_jax.config import ExperimentConfig
from tests.training.toy import toy_config

VIT = {"image_size": 32, "patch_size": 8, "width": 128, "depth": 1, "heads": 4, "mlp_width": 512}
TEXT = {"vocab_size": 512, "max_tokens": 16, "width": 256, "depth": 2, "heads": 4,
        "mlp_width": 1024}  # fmt: skip


def wide_config(**changes: Any) -> ExperimentConfig:
    """The toy experiment with wider towers and 32 pairs."""
    return toy_config(
        **{
            "towers.image.overrides": VIT,
            "towers.text.overrides": TEXT,
            "towers.image.head": "linear",
            "global_batch_size": 32,
            "embed_dim": 64,
        }
        | changes
    )
