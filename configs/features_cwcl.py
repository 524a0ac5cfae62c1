"""Trains heads on existing features of any two modalities, as CellCLIP's users do.

--config=configs/features_cwcl.py                      features made by the package; a minute
--config=configs/features_cwcl.py:loss=contrastive     the CL baseline; all else is equal
--config=configs/features_cwcl.py:loss=cellclip        CellCLIP's variant of the loss
--config=configs/features_cwcl.py:weights=relu2        another weight function of the cosine
--config=configs/features_cwcl.py:projection=trained   a trained projection of u too, which gives
                                                       the weights (README.md, "The locked side's
                                                       projection")
--config=configs/features_cwcl.py:data=features.npz,u=profile,v=compound
                                                       your own arrays, (examples, width) each
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults, parse_argument
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.recipes import experiment_name, set_loss, set_projection

OPTIONS = {
    "loss": "cwcl",
    "weights": "affine",
    "projection": "none",
    "data": "",
    "test": "",
    "u": "u",
    "v": "v",
}


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(argument, **OPTIONS)
    u, v = options["u"], options["v"]
    if not options["data"] and ((u, v) != ("u", "v") or options["test"]):
        raise ConfigError("u, v and test=FILE need data=FILE: add it")
    name = experiment_name("features_cwcl", options, OPTIONS)
    config = defaults(name=name, total_steps=1500, global_batch_size=256)

    # Only these two: a row that is unusable in an array that no tower reads would be left out.
    read = f"?features={u},{v}"
    config.data.train = f"arrays:{options['data']}{read}" if options["data"] else "made:train"
    widths = widths_of(options["data"], (u, v)) if options["data"] else {"u": 64, "v": 96}
    test = f"arrays:{options['test']}{read}" if options["test"] else "made:test?n=1000"

    # The shared space has U's width, so that U needs no projection; with a trained projection it
    # can have any other width.
    config.embed_dim = widths[u]
    config.towers[u] = tower(widths[u], head="none", tune="none")
    config.towers[v] = tower(widths[v], head="mlp", tune="head")
    set_projection(config, u, options["projection"])

    config.loss.weights_from = u
    set_loss(config, options)

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 1e-2

    if options["test"] or not options["data"]:
        config.evaluation.tasks.retrieval = defaults(
            Task, kind="retrieval", source=test, tower=u, partner=v
        )
    if not options["data"]:
        # Does the trained side know the classes, although training never named them?
        config.evaluation.tasks.classes = defaults(
            Task,
            kind="few_shot",
            source=test,
            train_source="made:train?n=6000",
            tower=v,
            shots=(1, 5),
        )
    return config


def tower(width: int, head: str, tune: str) -> ConfigDict:
    """Returns the settings of a tower of precomputed features with a head."""
    return defaults(
        TowerConfig, encoder="precomputed", overrides={"width": width}, head=head, tune=tune
    )


def widths_of(path: str, names: tuple[str, str]) -> dict[str, Any]:
    """Returns the widths of two arrays in an .npz file, read from their headers."""
    if not Path(path).is_file():
        raise ConfigError(f"data={path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"data={path} is no .npz file, as numpy.savez writes it. Other arrays: `arrays:` in "
            "configs/README.md"
        )
    with zipfile.ZipFile(path) as archive:
        known = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [name for name in names if name not in known]
        if missing:
            raise ConfigError(f"data={path} has no array {missing[0]!r}, only {', '.join(known)}")
        shapes = {name: _shape(archive, name) for name in names}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise ConfigError(f"data={path}: {name!r} has shape {shape}, not (examples, width)")
    return {name: shape[-1] for name, shape in shapes.items()}


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)[0]
