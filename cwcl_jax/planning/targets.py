"""Chips that this machine does not have, as targets for XLA's own compilers.

XLA compiles for an NVIDIA GPU or a TPU that is described but absent, if its plugin is installed
(extra `plan`): jax-cuda12-plugin and jax-cuda12-pjrt, without driver and CUDA libraries, and
libtpu. Such a compiler reports the same memory and collectives as on the real machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from cwcl_jax.planning.chips import Chip

# Parameters of XLA's cost model for a GPU (NVIDIA's architecture white papers): multiprocessors,
# float32 units and bytes of shared memory in each, bytes of it for one block, bytes of L2, GHz,
# compute capability.
_AMPERE = (108, 64, 167936, 166912, 40 * 2**20, 1.41, 8)
_HOPPER = (132, 128, 233472, 232448, 50 * 2**20, 1.98, 9)
_GPUS = {"a100-40": _AMPERE, "a100-80": _AMPERE, "h100": _HOPPER, "h200": _HOPPER}
_CUDNN = (9, 8, 0)
# Shapes of slices by number of chips (cloud.google.com/tpu/docs); v4 and v5p have three dimensions.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16",
}  # fmt: skip
_TPUS = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}

# Kernels cannot be tuned without the device: products go to cuBLAS, none to a tuned kernel.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


class NoCompiler(Exception):
    """Why nothing can be compiled for a chip: its plugin is missing, or has no such shape."""


def compiler_options(chip: Chip) -> dict[str, Any]:
    """Returns the options of `compile` for an absent chip."""
    return dict(_GPU_OPTIONS) if chip.is_gpu else {}


def chip_devices(chip: Chip, count: int) -> list[Any]:
    """Returns `count` devices to compile for.

    Raises:
      NoCompiler: the plugin is not installed, or has no such shape.
    """
    from jax.experimental import topologies

    platform, name, options = "tpu", "", {}
    if chip.is_gpu:
        each = min(count, chip.island)
        if count % each:
            raise NoCompiler(f"more than {each} of them come in whole nodes of {each}")
        platform, name = "cuda", chip.name
        options["topology"] = f"1x{count // each}x{each}"
        options["target_config"] = _gpu_description(chip)
    else:
        shapes = _TPUS[chip.name]
        if count not in shapes:
            raise NoCompiler(f"its slices have {', '.join(map(str, shapes))} chips")
        _prepare_libtpu(chip, count)
        name = f"{chip.name}:{shapes[count]}"
    try:
        made = topologies.get_topology_desc(name, platform, **options)
    except (NotImplementedError, RuntimeError) as error:
        raise NoCompiler("its compiler comes with pip install 'cwcl_jax[plan]'") from error
    return list(made.devices)


def _prepare_libtpu(chip: Chip, count: int) -> None:
    """Stops libtpu from asking an absent metadata server, and from locking an unused chip."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip.name}-{count}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _gpu_description(chip: Chip) -> str:
    """Returns XLA's GpuTargetConfigProto as text."""
    cores, units, shared, block_shared, cache, clock, capability = _GPUS[chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block_shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} patch: {_CUDNN[2]} }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{chip.name}"
"""


@contextlib.contextmanager
def as_on(chip: Chip) -> Iterator[None]:
    """Lets the model decide as on the chip: attention, rematerialisation, tiles of the loss.

    The model asks JAX for the backend's name, JAX asks cuDNN for its version, and the model tests
    whether the kernel compiles. All three get the chip's answers.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from cwcl_jax.models import attention

    major, minor, patch = _CUDNN
    answers: dict[tuple[Any, str], Any] = {
        (jax, "default_backend"): "gpu" if chip.is_gpu else "tpu",
        (cudnn, "check_cudnn_version"): 10_000 * major + 100 * minor + patch,
        (attention, "_cudnn_refuses"): "" if chip.is_gpu else chip.name,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), answer in answers.items():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, lambda *_, answer=answer: answer)
        yield
