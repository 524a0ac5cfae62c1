"""The plan as text for a terminal and for a README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cwcl_jax.config import ConfigError
from cwcl_jax.planning.compiled import Compiled
from cwcl_jax.planning.estimate import USABLE_MEMORY, Estimate
from cwcl_jax.planning.memory import Memory
from cwcl_jax.planning.towers import has_blocks
from cwcl_jax.training.state import count
from cwcl_jax.training.summary import format_table, size_text, trained_text

CUDNN_WANTS = (
    "it wants an NVIDIA GPU, bfloat16 or float16, and head sizes in multiples of 8 up to 128"
)
_MEMORY_ROWS = (
    ("params", "trained parameters, float32"),
    ("locked", "locked parameters"),
    ("optimizer", "optimizer state"),
    ("batches", "input batches, with those sent ahead"),
    ("gradients", "gradients"),
    ("activations", "activations of one chunk"),
    ("attention", "attention weights, where not fused"),
    ("loss", "loss: embeds of others, tiles"),
)


def report(
    base: Estimate,
    compiled: Compiled | None,
    others: Iterable[tuple[str, Estimate | ConfigError]],
    *,
    efficiency: float,
) -> str:
    """All sections."""
    parts = [_heading(base), _towers(base), _memory(base, compiled), _work(base, compiled)]
    parts += [_traffic(base, compiled), _time(base, efficiency)]
    rows = list(others)
    if rows:
        parts.append(_variants(rows))
    return "\n\n".join([*parts, _notes(base, compiled)])


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
    return "ring" if "ppermute" in base.work.sent else "gathered"


def _towers(base: Estimate) -> str:
    rows = []
    blueprint = base.blueprint
    for modality, tower in blueprint.config.towers.items():
        prefix = f"towers/{modality}/"
        leaves = {p: a for p, a in blueprint.abstract.items() if p.startswith(prefix)}
        trained = {p: a for p, a in leaves.items() if p in blueprint.trained}
        attention = "fused" if base.fused[modality] else "XLA"
        attention = attention if has_blocks(tower) else "none"
        rows.append(
            (
                modality,
                f"{tower.encoder} {tower.preset}".strip(),
                f"{count(leaves)[0]:,}",
                trained_text(count(leaves)[0], count(trained)[0]),
                "precomputed" if modality in base.embedded else attention,
            )
        )
    return format_table(("tower", "encoder", "parameters", "trained", "attention"), rows)


def _memory(base: Estimate, compiled: Compiled | None) -> str:
    memory, limit = base.memory, base.chip.memory
    rows = [(text, _gb(getattr(memory, name))) for name, text in _MEMORY_ROWS]
    rows.append(("peak (gradients or loss, whichever is more)", _gb(memory.total)))
    lines = [format_table(("bytes on one device, reckoned", "GB"), rows)]
    if compiled:
        whose = f"XLA for {base.chip.name}" if compiled.own else "XLA for CPUs"
        caveat = (
            "one batch of input among the arguments"
            if compiled.own
            else "attention is not fused there and bfloat16 is computed in float32, so a GPU or "
            "TPU needs far less; pip install 'cwcl_jax[plan]' brings the chips' own compilers"
        )
        lines.append(
            f"{whose}, of the compiled step: {_gb(compiled.argument_bytes)} GB arguments, "
            f"{_gb(compiled.temporary_bytes)} GB temporary ({caveat})"
        )
        if compiled.refused:
            lines.append(f"XLA for {base.chip.name} does not take the step: {compiled.refused}")
    told = compiled.argument_bytes + compiled.temporary_bytes if compiled and compiled.own else 0
    refused = bool(compiled and "RESOURCE_EXHAUSTED" in compiled.refused)
    fits = base.fits and told <= USABLE_MEMORY * limit and not refused
    verdict = "fits" if fits else "DOES NOT FIT"
    lines.append(
        f"{verdict} in {USABLE_MEMORY:.0%} of {_gb(limit)} GB; largest global batch that fits, "
        f"reckoned: {base.largest_batch():,}"
    )
    return "\n".join(lines)


def _work(base: Estimate, compiled: Compiled | None) -> str:
    work, loss = base.work, base.loss_work
    parts = ", ".join(
        f"{_amount(flops)}FLOP {_PRECISIONS[precision]}" for precision, flops in base.flops.items()
    )
    lines = [
        f"work of one device in a step: {_amount(work.total_flops)}FLOP in matrix products "
        f"({parts}); of these the loss {_amount(loss.total_flops)}FLOP"
    ]
    if work.endless:
        lines.append(f"{work.endless} loops of unknown length are counted once")
    if compiled and compiled.product_flops:
        lines.append(
            f"compiled: {_amount(compiled.product_flops)}FLOP in matrix products with loops "
            f"counted as often as they run; XLA's cost analysis, which counts each loop's body "
            f"once: {_amount(compiled.cost_flops)}FLOP"
        )
    return "\n".join(lines)


_PRECISIONS = {
    "half": "bfloat16",
    "single": "float32, default precision",
    "high": "float32, high",
    "highest": "float32, highest",
}


def _traffic(base: Estimate, compiled: Compiled | None) -> str:
    rows = [(f"reckoned: {purpose}", "", _gb(sent)) for purpose, sent in base.sent.items()]
    if compiled:
        rows += [
            (f"compiled: {kind}", f"{found.count:,}", _gb(found.sent_bytes))
            for kind, found in compiled.traffic.items()
        ]
    if not rows:
        return "nothing is sent between devices"
    return format_table(("sent by one device in a step", "operations", "GB"), rows)


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
    return (
        format_table(header, rows)
        + f"\nlimits: compute {times.compute:.3g} s, memory {times.memory:.3g} s, network "
        f"{times.network:.3g} s; {times.limit} decides"
    )


def _variants(rows: Sequence[tuple[str, Estimate | ConfigError]]) -> str:
    cells = []
    for name, found in rows:
        if isinstance(found, ConfigError):
            cells.append((name, "cannot be", "", "", "", "", str(found).split(";")[0][:60]))
            continue
        memory: Memory = found.memory
        cells.append(
            (
                name,
                _gb(memory.total),
                _gb(memory.activations + memory.attention),
                _amount(found.work.total_flops).strip(),
                _gb(sum(found.sent.values())),
                f"{found.times.roofline:.3g} ({found.times.limit})",
                f"{found.largest_batch():,}",
            )
        )
    header = ("what changes", "GB", "activations", "FLOP", "GB sent", "s a step", "largest batch")
    return format_table(header, cells)


def _notes(base: Estimate, compiled: Compiled | None) -> str:
    lines = ["GB are 10^9 bytes. Reckoned from traced shapes; nothing was run."]
    for modality, fused in base.fused.items():
        tower = base.blueprint.config.towers[modality]
        if base.chip.is_gpu and not fused and tower.attention != "xla":
            lines.append(f"{modality}: cuDNN's attention is not taken: {CUDNN_WANTS}")
    if compiled:
        devices = "1 device" if base.devices == 1 else f"{base.devices} devices"
        lines.append(f"lowered and compiled for {devices} in {compiled.seconds:.0f} s")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size >= 5e6 else f"{size / 1e9:.2g}"


def _amount(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g} "
