"""Measures weak scaling of the train step: python -m cwcl_jax.benchmarks.step --processes=1,2,4.

Each measurement is a job of several processes with the same number of examples on every device. It
reports the seconds of a step, the bytes that a device sends in a step, read from the compiled
program, and the bytes predicted by the formulas below. The formulas then predict what 8, 64 and 512
A100s would send for the paper's experiment. Writes step.md and step.json.

Per device and step, with N examples, P devices, embeddings of width d, features of width k and W
trained weights, in values of float32:

    gathered    (P-1)/P * N (2 d + 8)   columns, their gradient, statistics (two reduced)
    ring        N (3 d + 6) + N/P (d + 4)   the columns twice, their gradient, statistics; gradient
                                        and statistics travel one hop more
    moments     (P-1)/P * 2 (k d + k + 2 d)   closed form of the weighted direction
    gradients   (P-1)/P * 2 W           one all-reduce
    ranks       (P-1)/P * 4 d^2         one all-reduce of each tower's second moment (diagnostics)

With --peer=torch: measures the parts of one process's step alternating with the same towers in
PyTorch, on the local device. --config names an image-text run; the default is a ViT 192 x 6 and a
text tower 256 x 6 at 256 pairs. Writes peer.md and peer.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from typing import Any

from cwcl_jax import cli
from cwcl_jax.benchmarks import harness, peer
from cwcl_jax.benchmarks.harness import Row, run_fresh
from cwcl_jax.config import ConfigError

FORMS = ("gathered", "ring")
# Peak bandwidths: NVLink 3 has 300 GB/s each way; between nodes eight adapters of 200 Gbit/s serve
# eight A100s. The times are therefore lower bounds.
_NVLINK, _BETWEEN_NODES = 300e9, 25e9
_PER_NODE = 8


def experiment(batch: int, form: str) -> Any:
    """Returns the default image-text run, from scratch, with `batch` examples."""
    from cwcl_jax.config import defaults, from_config_dict
    from cwcl_jax.models.tower import TowerConfig

    config = defaults(name="benchmark", total_steps=100, global_batch_size=batch, embed_dim=96)
    config.data.train = "scenes:train"
    config.towers.image = defaults(
        TowerConfig, encoder="vit", preset="tiny", tune="none", head="none"
    )
    config.towers.text = defaults(TowerConfig, encoder="text", preset="tiny")
    config.loss.form = form
    return from_config_dict(config)


def made_batch(config: Any, rows: int) -> dict[str, Any]:
    """Returns this process's examples: noise of the right shapes."""
    import numpy as np

    rng = np.random.default_rng(0)
    inputs = config.data.inputs
    size, length = inputs["image"].size, inputs["text"].max_tokens
    return {
        "image": {"pixels": rng.integers(0, 256, (rows, size, size, 3), np.uint8)},
        "text": {
            "tokens": rng.integers(4, 200, (rows, length)).astype(np.int32),
            "mask": np.ones((rows, length), bool),
        },
    }


def measure(job: Row) -> Row | None:
    """Runs one process's part of a measurement; returns the result on process 0, else None."""
    import jax

    from cwcl_jax.planning.collectives import traffic
    from cwcl_jax.training import sharding
    from cwcl_jax.training.distributed import initialize, is_primary
    from cwcl_jax.training.options import DistributedConfig
    from cwcl_jax.training.state import initialise, make_blueprint
    from cwcl_jax.training.step import TrainStep

    initialize(DistributedConfig())
    devices = jax.device_count()
    config = experiment(job["examples"] * devices, job["form"])
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    state, locked, _ = initialise(blueprint)
    rows = job["examples"] * jax.local_device_count()
    batch = sharding.put_batch(blueprint.mesh, made_batch(config, rows))
    compiled = TrainStep(blueprint).lower(batch).compile()
    seconds = []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        state, metrics = compiled(state, locked, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    found = traffic(compiled.as_text())
    if not is_primary():
        return None
    sent = {kind: round(one.sent_bytes) for kind, one in found.items()}
    shape = (config.global_batch_size, devices, *widths(blueprint))
    return {
        "devices": devices,
        "batch": config.global_batch_size,
        "seconds": statistics.median(seconds[1:]),
        "fastest_seconds": min(seconds[1:]),
        "sent_bytes": sent,
        "sent_total": sum(sent.values()),
        "formula_total": round(sum(formula(*shape)[job["form"]].values())),
    }


def widths(blueprint: Any) -> tuple[int, int, int]:
    """Returns embedding width, width of the weights' features, and number of trained weights."""
    config = blueprint.config
    model = blueprint.model_def.merge(blueprint.abstract)
    features = model.towers[config.loss.weights_from].feature_width
    trained = sum(leaf.size for leaf in blueprint.abstract_params.values())
    return config.embed_dim, features, trained


def formula(batch: int, devices: int, d: int, k: int, weights: int) -> dict[str, dict[str, float]]:
    """Returns the bytes that a device sends in a step, by form and part (see the module)."""
    if devices == 1:
        return {form: {} for form in FORMS}
    share = 4 * (devices - 1) / devices
    common = {
        "moments": share * 2 * (k * d + k + 2 * d),
        "gradients": share * 2 * weights,
        "ranks": share * 4 * d * d,
    }
    return {
        "gathered": {"loss": share * batch * (2 * d + 8)} | common,
        "ring": {"loss": 4.0 * batch * (3 * d + 6 + (d + 4) / devices)} | common,
    }


def on_paper() -> list[Row]:
    """Returns what A100s would send for the paper's image-text experiment, with minimal times."""
    d, k, weights = 1024, 1024, paper_weights()
    rows = []
    for devices in (8, 64, 512):
        bandwidth = _NVLINK if devices <= _PER_NODE else _BETWEEN_NODES
        for batch in sorted({16_384, 2_048 * devices}):
            for form, parts in formula(batch, devices, d, k, weights).items():
                total = sum(parts.values())
                rows.append(
                    {"devices": devices, "batch": batch, "form": form}
                    | {f"{name}_mb": value / 1e6 for name, value in parts.items()}
                    | {"total_mb": total / 1e6, "least_ms": total / bandwidth * 1e3}
                )
    return rows


def paper_weights() -> int:
    """Returns the number of trained weights of the paper's image-text run.

    Its text tower is trained from scratch (preset B).
    """
    import jax

    from cwcl_jax.config import defaults, from_config_dict
    from cwcl_jax.models.tower import TowerConfig
    from cwcl_jax.training import sharding
    from cwcl_jax.training.state import make_blueprint

    config = defaults(name="paper", total_steps=1, global_batch_size=16_000, embed_dim=1024)
    config.data.train = "scenes:train"
    # Layers in one array: as many weights, and one of them is traced instead of 24.
    config.towers.image = defaults(
        TowerConfig, encoder="vit", preset="ViT-L/16", tune="none", head="none", scan_layers=True
    )
    config.towers.text = defaults(
        TowerConfig, encoder="text", preset="B", overrides={"vocab_size": 30_522}, scan_layers=True
    )
    frozen = from_config_dict(config)
    mesh = sharding.make_mesh(frozen.mesh, jax.devices()[:1])
    return widths(make_blueprint(frozen, mesh, check_batch=False))[2]


MEASURED = (
    "form", "processes", "devices", "batch", "seconds", "fastest_seconds",
    "sent_bytes", "sent_total", "formula_total", "failed",
)  # fmt: skip
COMPUTED = (
    "devices", "batch", "form", "loss_mb", "moments_mb", "gradients_mb", "ranks_mb", "total_mb",
    "least_ms",
)  # fmt: skip


def _define(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--processes", type=cli.counts, default="1,2,4", help="numbers of processes")
    add("--devices", type=cli.at_least(1), default=1, help="devices per process")
    add("--platform", choices=("cpu", "cuda"), default="cpu", help="platform of the devices")
    add("--examples", type=cli.at_least(1), default=64, help="examples per device")
    add("--forms", type=cli.names(FORMS), default=list(FORMS), help="forms of the loss")
    add("--steps", type=cli.at_least(2), default=12, help="steps; the first is not timed")
    add("--peer", choices=("", "torch"), default="", help="compare the step's parts with PyTorch")
    harness.define(parser, "step")
    harness.define_job(parser)


@cli.command(_define, config=True)
def main(options: argparse.Namespace) -> int:
    """Measures all forms and numbers of processes; fails if a measurement fails."""
    if options.job:
        result = measure(options.job)
        if result is not None:
            print(json.dumps(result))
        return cli.DONE
    if options.peer:
        rows = peer.race(options.config or peer.default_experiment(), options.steps - 1)
        harness.report(options.output, "peer", {"peer": rows}, {"peer": peer.COLUMNS})
        return cli.DONE
    if options.config is not None:
        raise ConfigError("--config is for --peer=torch: the other measurement has its own run")
    rows = []
    for form, processes in itertools.product(options.forms, options.processes):
        job = {"form": form, "examples": options.examples, "steps": options.steps}
        row = run_fresh(
            "cwcl_jax.benchmarks.step", job, options.timeout,
            processes=processes, devices=options.devices, platform=options.platform,
        )  # fmt: skip
        rows.append(row | {"processes": processes})
        print(harness.markdown(rows[-1:], MEASURED).splitlines()[-1], flush=True)
    tables = {"measured": rows, "on_paper": on_paper()}
    harness.report(options.output, "step", tables, {"measured": MEASURED, "on_paper": COMPUTED})
    return harness.code_of(rows)


if __name__ == "__main__":
    sys.exit(main())
