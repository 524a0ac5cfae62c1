"""Compiler flags of the tests, for this process and those that it starts. Imports no jax.

Toy programs run for milliseconds, and their compilation is most of the suite's time. XLA's older
emitters and one module for each program compile them in a quarter of the CPU time.
CWCL_TEST_OPTIMIZED=1 compiles as users do.
"""

import os

OPTIMIZED = os.environ.get("CWCL_TEST_OPTIMIZED", "0") not in ("", "0")
# The first is no flag of its own in every version of jaxlib, and an unknown flag ends the process.
_FAST = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def with_devices(count: int) -> str:
    """Returns XLA_FLAGS for a process with that many CPU devices."""
    devices = f"--xla_force_host_platform_device_count={count}"
    return devices if OPTIMIZED else f"{devices} {_FAST}"
