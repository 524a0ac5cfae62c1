"""CWCL in JAX: aligns one tower with a locked one, weighted by the locked tower's similarities.

    loss, diagnostics = cwcl_loss(u, v, weights_from=p, logit_scale=log_of_inverse_temperature)

The names below are imported on first use, so that `import cwcl_jax` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwcl_jax.api import load_embeddings, load_model
    from cwcl_jax.losses import (
        LossConfig,
        channel_profiles,
        contrastive_loss,
        cwcl_loss,
        make_loss,
        sigmoid_loss,
    )

__all__ = [
    "LossConfig",
    "channel_profiles",
    "contrastive_loss",
    "cwcl_loss",
    "load_embeddings",
    "load_model",
    "make_loss",
    "sigmoid_loss",
]

_HOME = dict.fromkeys(__all__, "cwcl_jax.losses")
_HOME |= dict.fromkeys(("load_embeddings", "load_model"), "cwcl_jax.api")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cwcl_jax")
    if name not in _HOME:
        raise AttributeError(f"module 'cwcl_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
