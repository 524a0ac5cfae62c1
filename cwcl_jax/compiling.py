"""Compiler options of XLA for programs on CPUs."""

from __future__ import annotations

import functools

import jax

_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
# jax 0.10 uses the library YNNPACK for products and sums. Its sums are faster, but its products
# take 1.5 times as long as those of XLA's own Eigen (models/README.md, "Measured").
_ONLY_SUMS = {_LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE"}


def options(platform: str | None = None) -> dict[str, str] | None:
    """Returns `compiler_options` of `jax.jit` for the step and the encoders.

    Args:
      platform: the devices' kind, as `Device.platform`; by default jax's default backend.

    Returns:
      None if there is nothing to set: on other platforms, or if this jaxlib lacks the option.
    """
    platform = platform or jax.default_backend()
    return dict(_ONLY_SUMS) if platform == "cpu" and _known() else None


@functools.cache
def _known() -> bool:
    """Returns whether this jaxlib accepts the option, which is experimental and may be removed."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_ONLY_SUMS)()
    except Exception:  # any error means that the option is unsupported; the default is always right
        return False
    return True
