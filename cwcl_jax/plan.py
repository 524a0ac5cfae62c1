"""Says what a run needs before anything is rented: `python -m cwcl_jax.plan --mesh=a100x4 ...`.

`--mesh=a100x4` names a chip and a number of devices. The config's model, optimizer and train step
are built for that many devices without data, weights or memory. Printed are parameters, state on
a device, flops and the time at the chip's peaks. XLA's own compiler for the chip, where it is
installed (extra `plan`), compiles the step, which is never run, and says what it needs and sends;
a few compilations more find the largest batch that fits (`--nosearch` leaves them out), one for
each setting what that would change (`--variants`). Chips: a100-40, a100-80, h100, h200, v4, v5e,
v5p, v6e.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.models.tower import TowerConfig

if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    flags.declare_key_flag("config")  # so that --help shows it
    _MESH = flags.DEFINE_string("mesh", "", "Chip and number of devices, for example a100x4.")
    _COMPILE = flags.DEFINE_bool("compile", True, "Compile the step; without: work and state only.")
    _SEARCH = flags.DEFINE_bool("search", True, "Compile more batches to find the largest one.")
    _VARIANTS = flags.DEFINE_bool("variants", False, "Also say what other settings would change.")
    _EFFICIENCY = flags.DEFINE_float(
        "efficiency", 0.5, "Share of the roofline that a real run is taken to reach."
    )
    _OUTPUT = flags.DEFINE_string("output", "", "Also write the plan to this file.")


def plan(
    config: ExperimentConfig,
    mesh: str,
    *,
    compile_step: bool = True,
    search: bool = True,
    variants: bool = False,
    efficiency: float = 0.5,
) -> Iterator[str]:
    """The sections of the plan. Without the chip's compiler, as many devices of any kind as `mesh`.

    Args:
      search: also look for the largest batch.
      variants: also say what other settings would change.
      efficiency: share of the roofline that a real run is taken to reach.

    Raises:
      ConfigError: an unknown chip, or a config that cannot run on such a mesh.
    """
    from cwcl_jax.planning import inputs, report
    from cwcl_jax.planning import variants as changes
    from cwcl_jax.planning.chips import parse_mesh
    from cwcl_jax.planning.estimate import Planner

    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency={efficiency}: a share between 0 and 1")
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
    except ValueError as error:  # an encoder's, about its own settings
        raise ConfigError(f"config.towers: {error}") from error
    yield report.report(base, efficiency=efficiency, missing=planner.missing)
    if search and not planner.missing:
        yield f"largest global batch that was found to fit: {planner.largest_batch(base):,}"
    if variants:
        yield report.variants_table(changes.variants(base, planner))


def without_files(config: ExperimentConfig) -> ExperimentConfig:
    """The config without weights; a tower without preset has the sizes of its weights' folder.

    Raises:
      ConfigError: such a folder is not here.
    """
    return dataclasses.replace(
        config,
        towers={name: _without_file(name, tower) for name, tower in config.towers.items()},
    )


def _without_file(modality: str, tower: TowerConfig) -> TowerConfig:
    from cwcl_jax.models.encoders import encoder_family
    from cwcl_jax.pretrained import complete

    if tower.weights and not tower.preset:
        try:
            tower = complete(tower)
        except (OSError, ValueError) as error:
            presets = ", ".join(encoder_family(tower.encoder).presets)
            raise ConfigError(
                f"the {modality} tower's sizes stand in its weights, {tower.weights}, which are "
                f"not here; name a preset instead: --config.towers.{modality}.preset=... "
                f"({presets})"
            ) from error
    return dataclasses.replace(tower, weights="")


def check(config: ExperimentConfig) -> None:
    """Raises ConfigError where training would refuse the settings, as far as no file is needed."""
    from cwcl_jax.losses import make_loss
    from cwcl_jax.training.checks import check_inputs

    try:
        make_loss(config.loss)
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}") from error
    # A tokenizer may lie on a hub or a cluster; in place of its words, the package's few.
    inputs = {name: modality.without_files() for name, modality in config.data.inputs.items()}
    check_inputs(dataclasses.replace(config, data=dataclasses.replace(config.data, inputs=inputs)))


def virtual_devices(count: int) -> None:
    """Makes this process one of `count` CPU devices; before JAX has looked for any."""
    import jax

    forced = r"--xla_force_host_platform_device_count=\d+"
    os.environ["XLA_FLAGS"] = re.sub(forced, "", os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def main(argv: list[str]) -> int:
    """Resolves the flags, prints the plan."""
    del argv
    from cwcl_jax.planning.chips import parse_mesh

    if not _MESH.value:
        raise ConfigError("--mesh is missing: a chip and a number of devices, such as a100x4")
    output = Path(_OUTPUT.value)
    if _OUTPUT.value and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--output={output}: name a file in a folder that exists")
    config = cli.resolve_config(_CONFIG)
    virtual_devices(parse_mesh(_MESH.value)[1])
    sections = plan(
        config,
        _MESH.value,
        compile_step=_COMPILE.value,
        search=_SEARCH.value,
        variants=_VARIANTS.value,
        efficiency=_EFFICIENCY.value,
    )
    told = []
    for section in sections:
        told.append(section + "\n")
        print(section, end="\n\n", flush=True)
    if _OUTPUT.value:
        output.write_text("\n".join(told), encoding="utf-8")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
