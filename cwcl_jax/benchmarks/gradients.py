"""Compares bfloat16 gradients with float32: python -m cwcl_jax.benchmarks.gradients --config=FILE.

Computes the real gradient of the loss for the first batch of a config at its initial weights, once
in each dtype. Reports |g16 - g32| / |g32| for every trained leaf, at each number of rows. For token
tables it also reports "kept": the share of the float32 gradient that the most frequent token
retains, because a sum of many bfloat16 terms stalls. The gradient of an attention key's bias is
zero up to rounding (softmax is invariant to it), so its row is meaningless. Writes gradients.md and
gradients.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from cwcl_jax import cli
from cwcl_jax.benchmarks import harness
from cwcl_jax.config import ExperimentConfig


def _define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=cli.counts, default="1024,4096", help="pairs in the batch")
    harness.define(parser, "gradients")


def first_batch(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the first batch that a run of the config would see, on the host."""
    from cwcl_jax.data.pipeline import train_batches
    from cwcl_jax.training.checks import check_inputs

    check_inputs(config)
    batches = train_batches(
        config.data,
        config.tower_names,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        process_index=0,
        process_count=1,
    )
    try:
        return next(iter(batches))
    finally:
        batches.close()


def gradients_in(
    config: ExperimentConfig, dtype: str, batch: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the gradients of the trained leaves at the initial weights, computed in `dtype`."""
    import jax
    import jax.numpy as jnp

    from cwcl_jax.data.options import BESIDE
    from cwcl_jax.training import sharding
    from cwcl_jax.training.state import initialise, make_blueprint
    from cwcl_jax.training.step import GradientFunction

    config = dataclasses.replace(config, dtype=dtype)
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    state, locked, _ = initialise(blueprint)
    function = jax.jit(lambda *x: GradientFunction(blueprint)(*x)[0])
    arrays = {k: v for k, v in batch.items() if k in (*config.towers, *BESIDE)}
    found = function(state.params, {**locked, **state.statistics}, arrays, jnp.int32(0))
    return {path: np.asarray(leaf, np.float64) for path, leaf in found.items()}


def errors(exact: np.ndarray, found: np.ndarray, tokens: np.ndarray | None) -> dict[str, float]:
    """Returns the relative "error" of a leaf.

    With `tokens`, those of the batch, also returns "kept" of the most frequent token.
    """
    size = np.linalg.norm(exact)
    result = {"error": float(np.linalg.norm(found - exact) / size) if size else 0.0}
    if tokens is not None:
        row = np.bincount(tokens).argmax()
        result["kept"] = float(found[row] @ exact[row] / (exact[row] @ exact[row]))
    return result


def measure(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Returns one row for each trained leaf of a config, at its batch size."""
    batch = first_batch(config)
    exact, found = (gradients_in(config, dtype, batch) for dtype in ("float32", "bfloat16"))
    rows = []
    for path, leaf in exact.items():
        tower = path.split("/")[1] if path.startswith("towers/") else ""
        is_table = path.endswith("token_embedding/embedding")
        tokens = batch[tower]["tokens"][batch[tower]["mask"]] if is_table else None
        rows.append({"leaf": path, "size": leaf.size} | errors(leaf, found[path], tokens))
    return rows


@cli.command(_define, config=True)
def main(options: argparse.Namespace) -> None:
    """Measures every number of rows and writes the tables."""
    config, sizes = cli.required(options.config), options.rows
    table: dict[str, dict[str, Any]] = {}
    for size in sizes:
        for row in measure(dataclasses.replace(config, global_batch_size=size)):
            line = table.setdefault(row["leaf"], {"leaf": row["leaf"], "size": row["size"]})
            line |= {f"{k} at {size}": v for k, v in row.items() if k in ("error", "kept")}
    names = ["leaf", "size", *(f"{k} at {size}" for size in sizes for k in ("error", "kept"))]
    rows = sorted(table.values(), key=lambda row: -row[f"error at {sizes[-1]}"])
    harness.report(options.output, "gradients", {"gradients": rows}, {"gradients": names})


if __name__ == "__main__":
    sys.exit(main())
