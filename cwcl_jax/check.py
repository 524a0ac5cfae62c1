"""Checks a machine within minutes: `python -m cwcl_jax.check [--config=FILE]`.

It checks versions and devices; the speed of products and memory; the exactness of products, of the
loss and of a token table's gradient; attention; the loss in its forms and tiles, and PyTorch's if
that is installed; one step of the job against the plan, and whether it gives the same bits twice;
the rate of decoded images; collectives between devices. By default the job has the paper's
image-text shapes; weights are random, data is noise, and the batch is halved until it fits. Prints
a table of PASS, LOOK (slow, or not measured) and FAIL (wrong) with advice, and writes it and all
numbers to --output. Runs alone or as every process of a job, see launch/README.md. The exit code is
1 if something failed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig

if TYPE_CHECKING:
    from cwcl_jax.checking.findings import Check, Finding, Machine

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax",
    "orbax-checkpoint", "torch",
)  # fmt: skip


def _define(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--seconds", type=float, default=420.0, help="seconds after which no new measurement starts"
    )
    cli.switch(
        parser, "tiny", False, "small sizes for two CPU cores, to see whether every check runs"
    )
    add("--only", type=cli.words, default=[], help="names of the checks to run; all by default")
    add("--output", type=cli.folder, default="runs/check", help="folder of the report")


def checks_of(config: ExperimentConfig | None, *, tiny: bool) -> list[tuple[str, float, Check]]:
    """Returns all checks in order: name, approximate seconds, function."""
    from cwcl_jax.checking import numerics, speed
    from cwcl_jax.checking.step import StepCheck, paper_shapes

    step = StepCheck(config or paper_shapes(tiny))
    return [
        ("devices", 0, devices),
        ("products", 20, numerics.products),
        ("loss", 20, numerics.loss),
        ("tokens", 15, numerics.token_table),
        ("peaks", 20, speed.peaks),
        ("attention", 20, numerics.attention),
        ("step", 150, step),
        ("speed", 60, speed.losses),
        ("collectives", 10, speed.collectives),
        ("input", 20, speed.reader(lambda: step.pairs_per_second)),
    ]


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that affect the results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices(machine: Machine) -> Iterator[Finding]:
    """Yields versions, devices and what they run on."""
    import jax

    from cwcl_jax.checking.findings import LOOK, PASS, Finding
    from cwcl_jax.training.distributed import compiler_flags
    from cwcl_jax.training.summary import unused_gpu

    device = machine.device
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    found = versions()
    said = (
        f"{jax.device_count()} x {device.device_kind} ({device.platform})"
        + (f" of {memory / 1e9:.0f} GB" if memory else "")
        + f", {jax.process_count()} processes, {len(os.sched_getaffinity(0))} cores for this one; "
        + ", ".join(f"{name} {version}" for name, version in found.items())
    )
    advice = unused_gpu(os.environ).removeprefix("warning: ")
    if not advice and device.platform != "cpu" and machine.chip is None:
        advice = "its peaks are not in planning/chips.py: speeds are reported without a verdict"
    values = found | {"kind": device.device_kind, "flags": compiler_flags(os.environ)}
    yield Finding("devices", LOOK if advice else PASS, said, advice, values)


@cli.command(_define, config=True)
def main(options: Namespace) -> int:
    """Runs the checks as every process of the job; process 0 reports."""
    config = options.config
    from cwcl_jax.training.distributed import initialize, is_primary, run_main
    from cwcl_jax.training.options import DistributedConfig

    distributed = config.distributed if config else DistributedConfig()
    initialize(distributed)

    def check(_: Any) -> int:
        from cwcl_jax.checking.findings import FAIL, Machine, run_checks, table
        from cwcl_jax.planning.inputs import without_files

        machine = Machine(options.tiny, time.perf_counter() + options.seconds)
        checks = checks_of(without_files(config) if config else None, tiny=options.tiny)
        known = [name for name, *_ in checks]
        for name in options.only:
            if name not in known:
                raise ConfigError(f"--only={name}: unknown check; known: {', '.join(known)}")
        found = []
        for finding in run_checks(machine, [c for c in checks if c[0] in (options.only or known)]):
            found.append(finding)
            if is_primary():
                print(f"{finding.verdict}  {finding.check}: {finding.found}", flush=True)
        if is_primary():
            _write(options.output, found, table(found))
        return cli.FAILED if any(finding.verdict == FAIL for finding in found) else cli.DONE

    return run_main(check, distributed, code_of=cli.exit_code)


def _write(output: Path, found: list[Finding], text: str) -> None:
    """Prints the table, and writes it and all numbers."""
    print("\n" + text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "check.txt").write_text(text + "\n")
    rows = [
        {"check": f.check, "verdict": f.verdict, "found": f.found, "advice": f.advice} | f.values
        for f in found
    ]
    (output / "check.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
