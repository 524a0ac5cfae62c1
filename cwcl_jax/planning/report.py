"""The plan as text for a terminal or a README."""

from __future__ import annotations

from collections.abc import Iterable

from cwcl_jax.config import ConfigError
from cwcl_jax.planning.estimate import CUDNN_WANTS, USABLE_MEMORY, Estimate
from cwcl_jax.training.state import count
from cwcl_jax.training.summary import format_table, size_text, trained_text

_PRECISIONS = {
    "half": "bfloat16",
    "single": "float32, default precision",
    "high": "float32, high",
    "highest": "float32, highest",
}


def report(base: Estimate, *, efficiency: float, missing: str = "") -> str:
    """Returns the report of one config; `missing` says why nothing was compiled."""
    parts = [_heading(base), _towers(base), _memory(base, missing), _work(base), _traffic(base)]
    parts += [_time(base, efficiency), _input(base, efficiency), _notes(base)]
    return "\n\n".join(part for part in parts if part)


def _heading(base: Estimate) -> str:
    config, chip = base.blueprint.config, base.chip
    chunks = config.accumulation_steps
    return (
        f"{config.name} on {base.devices} x {chip.name} (mesh "
        + ", ".join(f"{axis} {size}" for axis, size in base.blueprint.mesh.shape.items())
        + f")\nglobal batch {config.global_batch_size:,}"
        + (f" in {chunks} chunks" if chunks > 1 else "")
        + f", {config.total_steps:,} steps, loss {config.loss.name} ({_form(base)}), {config.dtype}"
        + f"\nchip: {_amount(chip.half)}FLOP/s bfloat16, {_amount(chip.highest)}FLOP/s float32 at "
        + f"'highest', {size_text(chip.bandwidth)}/s, {size_text(chip.memory)}, sends "
        + f"{size_text(chip.sends(base.devices))}/s\nsource: {chip.source}"
    )


def _form(base: Estimate) -> str:
    form = base.blueprint.config.loss.form
    if form in ("dense", "fused"):
        return form
    if base.devices == 1:
        return "one device"
    return "ring" if "ppermute" in base.work.operations else "gathered"


def _towers(base: Estimate) -> str:
    rows = []
    blueprint = base.blueprint
    for modality, tower in blueprint.config.towers.items():
        prefix = f"towers/{modality}/"
        leaves = {p: a for p, a in blueprint.abstract.items() if p.startswith(prefix)}
        trained = {p: a for p, a in leaves.items() if p in blueprint.trained}
        encoder = f"{tower.encoder} {tower.preset}".strip()
        encoder += " (precomputed)" if modality in base.embedded else ""
        parameters = count(leaves)[0]
        told = trained_text(parameters, count(trained)[0])
        rows.append((modality, encoder, f"{parameters:,}", told))
    return format_table(("tower", "encoder", "parameters", "trained"), rows)


def _memory(base: Estimate, missing: str) -> str:
    rows = [(name, _gb(size)) for name, size in base.state.items()]
    rows.append(("batches of input sent ahead", _gb(base.sent_ahead)))
    if base.compiled:
        batch = base.compiled.arguments - sum(base.state.values())
        rows.append(("batch of the step", _gb(batch)))
        rows.append((f"temporary, says XLA for {base.chip.name}", _gb(base.compiled.temporary)))
        rows.append(("at the peak", _gb(base.bytes)))
    lines = [format_table(("bytes on one device", "GB"), rows)]
    share = f"in {USABLE_MEMORY:.0%} of {_gb(base.chip.memory)} GB"
    if missing:
        lines.append(
            f"activations, gradients, traffic and the largest batch: not known; they are read from "
            f"the step compiled for {base.chip.name}: {missing}"
        )
    else:
        fits = "fits" if base.bytes <= base.limit else "DOES NOT FIT"
        lines.append(f"{fits} {share}")
    if base.refused:
        lines.append(f"XLA for {base.chip.name} does not compile the step: {base.refused}")
    return "\n".join(lines)


def _work(base: Estimate) -> str:
    flops = base.work.flops
    parts = ", ".join(f"{_amount(flops[p])}FLOP {t}" for p, t in _PRECISIONS.items() if p in flops)
    line = (
        f"work of one device in a step: {_amount(base.work.total_flops)}FLOP in matrix products "
        f"({parts})"
    )
    endless = base.work.operations["while"]
    return line + (f"\n{endless} loops of unknown length are counted once" if endless else "")


def _traffic(base: Estimate) -> str:
    if not base.compiled:
        return ""
    rows = [
        (kind, f"{found.count:,}", _gb(found.sent_bytes))
        for kind, found in base.compiled.traffic.items()
    ]
    if not rows:
        return "nothing is sent between devices"
    return format_table(("sent by one device in a step", "operations", "GB"), rows)


def _input(base: Estimate, efficiency: float) -> str:
    """Returns a line on the cores that decode examples as fast as the devices need them."""
    config = base.blueprint.config
    read = [config.data.inputs_of(m) for m in config.towers if m not in base.embedded]
    seconds = sum(modality.core_seconds for modality in read)
    if not seconds or not base.times.roofline:
        return ""
    rate = config.global_batch_size / (base.times.roofline / efficiency) / base.devices
    return (
        f"input at {efficiency:.0%} of the roofline: {rate:,.0f} examples/s for each device, "
        f"decoded by {max(rate * seconds, 0.1):,.1f} cores at typical file sizes; one "
        "process for each device"
    )


def _time(base: Estimate, efficiency: float) -> str:
    config, times = base.blueprint.config, base.times
    rows = []
    for name, seconds in (
        ("at the roofline (a lower bound)", times.roofline),
        (f"at {efficiency:.0%} of it", times.roofline / efficiency),
    ):
        hours = config.total_steps * seconds / 3600
        rows.append(
            (
                name,
                f"{seconds:.3g} s",
                f"{config.global_batch_size / seconds:,.0f}",
                f"{hours:,.3g}",
                f"{hours * base.devices:,.4g}",
            )
        )
    header = ("time", "one step", "examples/s", "hours of the run", "device-hours")
    network = f"network {times.network:.3g} s" if base.compiled else "network not known"
    return (
        format_table(header, rows)
        + f"\nlimits: compute {times.compute:.3g} s, memory {times.memory:.3g} s, {network}; "
        f"{times.limit} decides"
    )


def variants_table(rows: Iterable[tuple[str, Estimate | ConfigError]]) -> str:
    """Returns a table of the effect of other settings."""
    cells = []
    for name, found in rows:
        if isinstance(found, ConfigError):
            cells.append((name, str(found).split(";")[0][:60], "", "", ""))
            continue
        peak, sent = "?", "?"
        if found.compiled:
            peak, sent = _gb(found.bytes), _gb(found.compiled.sent)
        elif found.refused:
            peak = "refused"
        flops = _amount(found.work.total_flops).strip()
        seconds = f"{found.times.roofline:.3g} ({found.times.limit})"
        cells.append((name, peak, flops, sent, seconds))
    header = ("what changes", "GB", "FLOP", "GB sent", "s a step")
    return format_table(header, cells)


def _notes(base: Estimate) -> str:
    lines = ["GB are 10^9 bytes. Nothing was run."]
    if base.chip.is_gpu and (fused := base.work.fused_attentions):
        lines.append(f"attention runs in cuDNN in {fused} places of the forward passes")
    elif base.chip.is_gpu:
        lines.append(f"cuDNN's attention is not used: {CUDNN_WANTS}")
    if base.compiled:
        lines.append(f"lowered and compiled in {base.compiled.seconds:.0f} s")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size >= 5e6 else f"{size / 1e9:.2g}"


def _amount(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g} "
