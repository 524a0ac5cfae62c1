"""Estimates what a run needs, before it is run: `python -m cwcl_jax.plan --mesh=a100x4 ...`.

`--mesh=a100x4` names a chip and a number of devices. The config's model, optimizer and train step
are built for that many devices without data, weights or memory. The plan lists parameters, state on
a device, flops and the time at the chip's peaks. If XLA's own compiler for the chip is installed
(extra `plan`), it compiles the step, which is never run, and reports its memory and communication.
A few more compilations find the largest batch that fits (`--nosearch` skips them), and one per
setting shows what that would change (`--variants`). Chips: a100-40, a100-80, h100, h200, v4, v5e,
v5p, v6e.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.planning.inputs import without_files


def _define(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--mesh", required=True, help="chip and number of devices, for example a100x4")
    cli.switch(parser, "compile", True, "do not compile the step: work and state only")
    cli.switch(parser, "search", True, "do not compile more batches to find the largest one")
    cli.switch(parser, "variants", False, "also report what other settings would change")
    about = "fraction of the roofline that a real run is assumed to reach"
    add("--efficiency", type=float, default=0.5, help=about)
    add("--output", default="", help="also write the plan to this file")


def plan(
    config: ExperimentConfig,
    mesh: str,
    *,
    compile_step: bool = True,
    search: bool = True,
    variants: bool = False,
    efficiency: float = 0.5,
) -> Iterator[str]:
    """Yields the sections of the plan.

    Without the chip's compiler, this process needs as many devices of any kind as `mesh` has.

    Args:
      search: also look for the largest batch.
      variants: also report what other settings would change.
      efficiency: share of the roofline that a real run is assumed to reach.

    Raises:
      ConfigError: an unknown chip, or a config that cannot run on such a mesh.
    """
    from cwcl_jax.planning import inputs, report
    from cwcl_jax.planning import variants as changes
    from cwcl_jax.planning.chips import parse_mesh
    from cwcl_jax.planning.estimate import Planner

    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency={efficiency}: a fraction between 0 and 1")
    planner = Planner(*parse_mesh(mesh), compile_step=compile_step)
    try:
        config = without_files(config)
        check(config)
        embedded: tuple[str, ...] = ()
        if "features_from=" in config.data.train:
            embedded = inputs.embedded_modalities(planner.blueprint(config))
        base = planner.estimate(config, embedded)
    except ConfigError:
        raise
    except ValueError as error:  # an encoder's error about its own settings
        raise ConfigError(f"config.towers: {error}") from error
    yield report.report(base, efficiency=efficiency, missing=planner.missing)
    if search and not planner.missing:
        yield f"largest global batch that was found to fit: {planner.largest_batch(base):,}"
    if variants:
        yield report.variants_table(changes.variants(base, planner))


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError if training would refuse the settings, as far as no file is needed."""
    from cwcl_jax.losses import make_loss
    from cwcl_jax.training.checks import check_inputs

    try:
        make_loss(config.loss)
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}") from error
    # A tokenizer may be on a hub or a cluster; the package's own replaces it.
    inputs = {name: modality.without_files() for name, modality in config.data.inputs.items()}
    check_inputs(dataclasses.replace(config, data=dataclasses.replace(config.data, inputs=inputs)))


def virtual_devices(count: int) -> None:
    """Gives this process `count` CPU devices; to be called before JAX initialises its devices."""
    import jax

    forced = r"--xla_force_host_platform_device_count=\d+"
    os.environ["XLA_FLAGS"] = re.sub(forced, "", os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


@cli.command(_define, config=True)
def main(options: Namespace) -> int:
    """Prints the plan."""
    from cwcl_jax.planning.chips import parse_mesh

    output = Path(options.output)
    if options.output and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--output={output}: name a file in a folder that exists")
    config = cli.required(options.config)
    virtual_devices(parse_mesh(options.mesh)[1])
    sections = plan(
        config,
        options.mesh,
        compile_step=options.compile,
        search=options.search,
        variants=options.variants,
        efficiency=options.efficiency,
    )
    told = []
    for section in sections:
        told.append(section + "\n")
        print(section, end="\n\n", flush=True)
    if options.output:
        output.write_text("\n".join(told), encoding="utf-8")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
