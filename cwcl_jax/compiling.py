"""Options of XLA for programs on CPUs."""

from __future__ import annotations

import functools

import jax

_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
# jax 0.10 hands products and sums to the library YNNPACK. Its sums are the faster ones, its
# products take 1.5 times as long as those of XLA's own Eigen (models/README.md, "Measured").
_ONLY_SUMS = {_LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE"}


def options(platform: str | None = None) -> dict[str, str] | None:
    """What `jax.jit(compiler_options=...)` is given for the step and the encoders.

    Args:
      platform: the devices' kind, as `Device.platform`; by default jax's default backend.

    Returns:
      None where there is nothing to set: on other platforms, and where this jaxlib has no such
      option.
    """
    platform = platform or jax.default_backend()
    return dict(_ONLY_SUMS) if platform == "cpu" and _known() else None


@functools.cache
def _known() -> bool:
    """Whether this jaxlib takes the option: it is experimental, and may go."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_ONLY_SUMS)()
    except Exception:  # a jaxlib names its refusal as it likes; the default is right everywhere
        return False
    return True
