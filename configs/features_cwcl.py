"""Any two modalities of which features exist already: only heads train (users like CellCLIP's).

--config=configs/features_cwcl.py                      features that the package makes; a minute
--config=configs/features_cwcl.py:loss=contrastive     the baseline CL, everything else equal
--config=configs/features_cwcl.py:loss=cellclip        CellCLIP's variant of the loss
--config=configs/features_cwcl.py:weights=relu         another weight function of the cosine
--config=configs/features_cwcl.py:both                 a trained head on either side
--config=configs/features_cwcl.py:data=features.npz,u=profile,v=compound
                                                       your own arrays, (examples, width) each
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults, parse_argument
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.models.tower import TowerConfig


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(
        argument, loss="cwcl", weights="", both=False, data="", test="", u="u", v="v"
    )
    u, v, both = options["u"], options["v"], options["both"]
    if not options["data"] and ((u, v) != ("u", "v") or options["test"]):
        raise ConfigError("u and v name arrays of data=FILE, and test=FILE goes with it: name data")
    config = defaults(name="features_cwcl", total_steps=1500, global_batch_size=256)

    config.data.train = f"arrays:{options['data']}" if options["data"] else "made:train"
    widths = widths_of(options["data"], (u, v)) if options["data"] else {"u": 64, "v": 96}
    test = f"arrays:{options['test']}" if options["test"] else "made:test?n=1000"

    # U gives the weights, from its features as they are; with `both` the logits come from a
    # projection of them. The shared space has U's width, unless U is projected.
    config.embed_dim = 64 if both else widths[u]
    config.towers[u] = tower(widths[u], head="linear" if both else "none")
    config.towers[v] = tower(widths[v], head="mlp")

    config.loss.name = options["loss"]
    config.loss.weights_from = u
    config.loss.weight_function = options["weights"]

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 1e-2

    if options["test"] or not options["data"]:
        config.evaluation.tasks.retrieval = defaults(
            TaskConfig, kind="retrieval", source=test, modality=u, partner=v
        )
    if not options["data"]:
        # Does the trained side know the classes that were never named to it?
        config.evaluation.tasks.classes = defaults(
            TaskConfig,
            kind="few_shot",
            source=test,
            train_source="made:train?n=6000",
            modality=v,
            shots=(1, 5),
        )
    return config


def tower(width: int, head: str) -> ConfigDict:
    """Features from a file, then a head; without one nothing trains."""
    return defaults(
        TowerConfig,
        encoder="precomputed",
        overrides={"width": width},
        head=head,
        tune="none" if head == "none" else "head",
    )


def widths_of(path: str, names: tuple[str, str]) -> dict[str, Any]:
    """Widths of two arrays of an .npz, from their headers."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        raise ConfigError(f"data={path}: there is no .npz file of that name")
    with zipfile.ZipFile(path) as archive:
        known = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [name for name in names if name not in known]
        if missing:
            raise ConfigError(f"data={path} has no array {missing[0]!r}, only {', '.join(known)}")
        shapes = {name: _shape(archive, name) for name in names}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ConfigError(f"data={path}: {name!r} has shape {shape}, not (examples, width)")
    return {name: shape[-1] for name, shape in shapes.items()}


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)[0]
