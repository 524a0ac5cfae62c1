"""Says what a run needs before anything is rented: `python -m cwcl_jax.plan --mesh=a100x4 ...`.

`--mesh=a100x4` names a chip and a number of devices. The config's model, optimizer and train step
are built for that many devices without data, weights or memory; the step is compiled, never run: by
XLA's own compiler for the chip where it is installed (extra `plan`). Printed are parameters, bytes
on a device, flops, traffic, the time at the chip's peaks, the largest batch that fits, and what
changes with other settings. Chips: a100-40, a100-80, h100, h200, v4, v5e, v5p, v6e.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from absl import flags

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.planning.chips import Chip

if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    flags.declare_key_flag("config")  # so that --help shows it
    _MESH = flags.DEFINE_string("mesh", "", "Chip and number of devices, for example a100x4.")
    _COMPILE = flags.DEFINE_bool("compile", True, "Compile the step; without: shapes only.")
    _VARIANTS = flags.DEFINE_bool("variants", True, "Also say what other settings would change.")
    _EFFICIENCY = flags.DEFINE_float(
        "efficiency", 0.5, "Share of the roofline that a real run is taken to reach."
    )
    _OUTPUT = flags.DEFINE_string("output", "", "Also write the plan to this file.")


def plan(
    config: ExperimentConfig,
    mesh: str,
    *,
    compile_step: bool = True,
    variants: bool = True,
    efficiency: float = 0.5,
) -> str:
    """The plan as text. The process must have as many devices as `mesh` says, of any kind.

    Raises:
      ConfigError: an unknown chip, or a config that cannot run on such a mesh.
    """
    import jax

    from cwcl_jax.planning import inputs, report
    from cwcl_jax.planning import variants as changes
    from cwcl_jax.planning.chips import parse_mesh
    from cwcl_jax.planning.compiled import compile_for_chip
    from cwcl_jax.planning.estimate import Planner

    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency={efficiency}: a share between 0 and 1")
    chip, count = parse_mesh(mesh)
    devices = jax.devices()[:count]
    if len(devices) < count:
        raise ConfigError(f"--mesh={mesh}: this process has only {len(devices)} devices")
    wanted = config.towers
    try:
        config = on_chip(without_files(config), chip)
        check(config)
    except ConfigError:
        raise
    except ValueError as error:  # an encoder's, about its own settings
        raise ConfigError(f"config.towers: {error}") from error
    planner = Planner(chip, devices)
    embedded: tuple[str, ...] = ()
    if "embeds=" in config.data.train:
        embedded = inputs.embedded_modalities(planner.estimate(config).blueprint)
    base = planner.estimate(config, embedded)
    for modality, tower in wanted.items():
        if tower.attention == "cudnn" and not base.fused[modality]:
            raise ConfigError(
                f"config.towers.{modality}.attention='cudnn' cannot run on {chip.name} with "
                f"{tower.dtype or config.dtype}: {report.CUDNN_WANTS}; leave it at 'auto'"
            )
    found = compile_for_chip(base) if compile_step else None
    others = changes.variants(base, planner) if variants else ()
    return report.report(base, found, others, efficiency=efficiency)


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


def on_chip(config: ExperimentConfig, chip: Chip) -> ExperimentConfig:
    """The config with what it would decide there: rematerialisation, the columns of a tile.

    Attention is left to the planner's own rule: cuDNN's cannot be traced where there is no cuDNN.
    """
    from cwcl_jax.planning.towers import has_blocks

    towers = {}
    for name, tower in config.towers.items():
        remat = "dots" if chip.is_gpu and has_blocks(tower) and tower.remat == "auto" else ""
        attention = "auto" if tower.attention == "cudnn" else tower.attention
        towers[name] = dataclasses.replace(tower, remat=remat or tower.remat, attention=attention)
    columns = config.loss.block_columns or config.global_batch_size
    loss = dataclasses.replace(config.loss, block_columns=columns)
    return dataclasses.replace(config, towers=towers, loss=loss)


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
    text = plan(
        config,
        _MESH.value,
        compile_step=_COMPILE.value,
        variants=_VARIANTS.value,
        efficiency=_EFFICIENCY.value,
    )
    print(text)
    if _OUTPUT.value:
        output.write_text(text + "\n", encoding="utf-8")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
