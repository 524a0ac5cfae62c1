"""Test environment: four virtual CPU devices, float32 by default, rank promotion is an error."""

import os

# Before the backend starts. Several CPU devices in one process can dead-lock with fewer
# runtime threads than devices have work queued (BUILD_NOTES.md, "CPU dead-lock").
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    ).strip()

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
