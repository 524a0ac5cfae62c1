"""The summary at the start of a run: towers, parameters, what trains, dtypes and bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.models.attention import choice
from cwcl_jax.models.transformer import Attention
from cwcl_jax.training.state import Blueprint, count

_HEADER = (
    "tower", "encoder", "parameters", "trained", "bytes", "compute", "attention", "weights",
)  # fmt: skip
# Plugins that JAX installs for NVIDIA's GPUs; without a driver they have no effect.
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_PROBED_TOKENS = 64


def tower_table(blueprint: Blueprint) -> str:
    """Returns a table of the towers with a line on the mesh below it."""
    config = blueprint.config
    model = blueprint.model_def.merge(blueprint.abstract)
    rows = []
    for modality, tower in config.towers.items():
        leaves = {
            p: a for p, a in blueprint.abstract.items() if p.startswith(f"towers/{modality}/")
        }
        parameters, size = count(leaves)
        trained, _ = count({p: a for p, a in leaves.items() if p in blueprint.trained})
        rows.append(
            (
                f"{modality} ({_role(config, modality)})",
                f"{tower.encoder} {tower.preset}".strip(),
                f"{parameters:,}",
                trained_text(parameters, trained),
                size_text(size),
                compute_text(model.towers[modality]),
                attention_text(model.towers[modality]),
                tower.weights or "initialised",
            )
        )
    mesh = ", ".join(f"{axis} {size}" for axis, size in blueprint.mesh.shape.items())
    device = blueprint.mesh.devices.flat[0].device_kind
    return (
        format_table(_HEADER, rows)
        + f"\nloss {config.loss.name}{_guide(config)}, global batch {config.global_batch_size}"
        + (f" by {config.data.batches}" if config.data.batches else "")
        + (f" in {config.accumulation_steps} chunks" if config.accumulation_steps > 1 else "")
        + f", {config.total_steps} steps, mesh ({mesh}) of {device} devices"
    )


def _role(config: ExperimentConfig, tower: str) -> str:
    if tower != config.loss.weights_from:
        return "V"
    return "U" if config.data.guide else "U: weights"


def _guide(config: ExperimentConfig) -> str:
    return f" with weights from {config.data.guide!r}" if config.data.guide else ""


def compute_text(tower: Any) -> str:
    """Returns the compute dtype, with the precision of float32 products: `float32 highest`."""
    return f"float32 {tower.precision}" if tower.dtype == "float32" else str(tower.dtype)


def attention_text(tower: Any) -> str:
    """Returns a tower's attention: `cudnn`, `xla`, or `-` if it has none of this package's.

    It is determined for a sequence of usual length; a length that the kernel refuses is reported
    when it is traced.
    """
    for _, module in nnx.iter_modules(tower):
        if isinstance(module, Attention):
            if module.implementation != "auto":
                return module.implementation
            size = module.query.out_features // module.heads
            return choice((_PROBED_TOKENS, module.heads, size), tower.dtype, True, module.causal)
    return "-"


def unused_gpu(environ: Mapping[str, str]) -> str:
    """Returns a warning if JAX's CUDA plugin is installed but the run is on the CPU, else ""."""
    installed = [name for name in _CUDA_PLUGINS if importlib.util.find_spec(name)]
    if not installed or jax.default_backend() != "cpu" or "cpu" in environ.get("JAX_PLATFORMS", ""):
        return ""
    return (
        f"warning: {installed[0]} is installed, but this runs on the CPU: JAX found no GPU or no "
        "driver. JAX_PLATFORMS=cuda makes that an error, JAX_PLATFORMS=cpu hides this warning"
    )


def trained_text(parameters: int, trained: int) -> str:
    """Returns `locked`, `all` or the number of trained parameters."""
    if trained == 0:
        return "locked"
    return "all" if trained == parameters else f"{trained:,}"


def size_text(size: float) -> str:
    """Returns bytes in readable form: `3.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns padded columns: the first left-aligned, numbers right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if _is_number(row[i]) and row is not header else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in lines
    )


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0].isdigit()
