"""Compares the step of an image-text run with the same towers in PyTorch, by parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cwcl_jax.benchmarks.harness import Row, interleaved
from cwcl_jax.config import ConfigError, ExperimentConfig, defaults, from_config_dict

Call = Callable[[], None]
COLUMNS = ("part", "seconds", "torch_seconds", "rate_ratio", "cpu_seconds", "torch_cpu_seconds")


def default_experiment() -> ExperimentConfig:
    """Returns a locked ViT 192 x 6 on 64 x 64 pixels, and a text tower 256 x 6 of 49,408 tokens."""
    from cwcl_jax.models.tower import TowerConfig

    config = defaults(name="peer", total_steps=1000, global_batch_size=256, embed_dim=192)
    config.data.train = "scenes:train"
    vit = {"width": 192, "depth": 6, "heads": 3, "mlp_width": 768}
    text = {"width": 256, "depth": 6, "heads": 4, "mlp_width": 1024, "vocab_size": 49408}
    config.towers.image = defaults(
        TowerConfig, encoder="vit", preset="tiny", tune="head", head="linear", overrides=vit
    )
    config.towers.text = defaults(TowerConfig, encoder="text", preset="tiny", overrides=text)
    return from_config_dict(config)


def race(config: ExperimentConfig, rounds: int) -> list[Row]:
    """Measures the seconds of each part, alternating between ours and PyTorch's.

    Args:
      config: an image tower "vit" with a locked encoder, and a text tower "text"; the batch is
          noise.
      rounds: how often each part runs; one more run is not counted.

    Returns:
      One row for each part: medians of seconds and of CPU seconds, and PyTorch's seconds divided by
          ours (above 1: ours is faster), the median over the rounds.

    Raises:
      ConfigError: other towers, which have no PyTorch counterpart here.
    """
    from cwcl_jax.benchmarks import torch_towers

    kinds = {name: tower.encoder for name, tower in config.towers.items()}
    if kinds != {"image": "vit", "text": "text"}:
        raise ConfigError(f"--peer=torch has towers image=vit and text=text, not {kinds}")
    image, text = (config.towers[name].encoder_settings() for name in ("image", "text"))
    batch = _noise(config, text.vocab_size)
    ours = _parts(config, batch)
    theirs = torch_towers.parts(image, text, config.embed_dim, batch["image"] | batch["text"])
    turns = {
        f"{who}, {part}": _timed(call)
        for part in ours
        for who, call in (("ours", ours[part]), ("torch", theirs[part]))
    }
    found = {key: times[1:] for key, times in interleaved(turns, rounds=rounds + 1).items()}
    return [_row(part, found[f"ours, {part}"], found[f"torch, {part}"]) for part in ours]


def _row(part: str, ours: list[tuple[float, float]], torch: list[tuple[float, float]]) -> Row:
    def medians(times: list[tuple[float, float]]) -> list[float]:
        return [statistics.median(column) for column in zip(*times, strict=True)]

    (seconds, cpu), (torch_seconds, torch_cpu) = medians(ours), medians(torch)
    ratio = statistics.median(b[0] / a[0] for a, b in zip(ours, torch, strict=True))
    return dict(zip(COLUMNS, (part, seconds, torch_seconds, ratio, cpu, torch_cpu), strict=True))


def _timed(call: Call) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - start, time.process_time() - cpu

    return run


def _noise(config: ExperimentConfig, words: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns a batch whose texts have between a quarter of the tokens and all of them."""
    rng = np.random.default_rng(0)
    rows = config.global_batch_size
    inputs: Any = config.data.inputs
    size, length = inputs["image"].size, inputs["text"].max_tokens
    return {
        "image": {"pixels": rng.integers(0, 256, (rows, size, size, 3), np.uint8)},
        "text": {
            "tokens": rng.integers(4, words, (rows, length)).astype(np.int32),
            "mask": np.arange(length) < rng.integers(length // 4, length + 1, (rows, 1)),
        },
    }


def _parts(config: ExperimentConfig, raw: Mapping[str, Any]) -> dict[str, Call]:
    """Returns the step's parts by name; each call waits for its result."""
    import jax
    import jax.numpy as jnp
    import optax

    from cwcl_jax import compiling
    from cwcl_jax.training import sharding
    from cwcl_jax.training.encode import EncodeFunctions
    from cwcl_jax.training.state import initialise, make_blueprint
    from cwcl_jax.training.step import TrainStep

    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    state, locked, _ = initialise(blueprint)
    batch = sharding.put_batch(blueprint.mesh, raw)
    encode = EncodeFunctions(blueprint)
    image, text = (encode.get(name, "features") for name in ("image", "text"))
    # The step donates its state; the other parts work on copies.
    params = jax.tree.map(jnp.copy, state.params)
    trained = {path: leaf for path, leaf in params.items() if path.startswith("towers/text/enc")}
    kept = {"step": state, "optimizer": jax.tree.map(jnp.copy, (state.opt_state, params))}
    ones = jax.tree.map(jnp.ones_like, params)
    optimizer = blueprint.optimizer()

    def objective(some: Any, params: Any, locked: Any, batch: Any) -> jax.Array:
        model = blueprint.model_def.merge({**params, **locked, **some})
        return jnp.sum(jnp.square(model.towers["text"].features(batch)))

    def update(gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return opt_state, optax.apply_updates(params, updates)

    options = compiling.options(jax.default_backend())
    gradients = jax.jit(jax.grad(objective), compiler_options=options)
    updated = jax.jit(update, donate_argnums=(1, 2), compiler_options=options)
    step = TrainStep(blueprint)

    def one_step() -> Any:
        kept["step"], metrics = step(kept["step"], locked, batch)
        return kept["step"], metrics

    def one_update() -> Any:
        kept["optimizer"] = updated(ones, *kept["optimizer"])
        return kept["optimizer"]

    calls = {
        "image forward": lambda: image(params, locked, batch["image"]),
        "text forward": lambda: text(params, locked, batch["text"]),
        "text forward and backward": lambda: gradients(trained, params, locked, batch["text"]),
        "optimizer": one_update,
        "step": one_step,
    }
    return {name: lambda c=call: jax.block_until_ready(c()) for name, call in calls.items()}
