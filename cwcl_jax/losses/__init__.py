"""Contrastive losses with soft targets: exact, with linear memory, on one device or any mesh."""

from cwcl_jax.losses.api import contrastive_loss, cwcl_loss, sigmoid_loss
from cwcl_jax.losses.make import LossFn, make_loss
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.losses.weights import channel_profiles

__all__ = [
    "LossConfig",
    "LossFn",
    "channel_profiles",
    "contrastive_loss",
    "cwcl_loss",
    "make_loss",
    "sigmoid_loss",
]
