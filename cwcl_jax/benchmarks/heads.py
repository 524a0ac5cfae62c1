"""Losses compared on heads alone: features of a trained trunk, a new head for each loss and seed.

    python -m cwcl_jax.benchmarks.heads --config=configs/speech_cwcl.py:head,init=runs/first \
        --losses=contrastive,affine,uniform0.53,relu2 --seeds=3 --output=heads.json

The features of the training data and of the test items are computed once and kept; then a head
takes seconds. All losses see the same batches. `--group=4` fills batches with groups of near
duplicates: every example is joined by three random ones of its ten nearest in text space (in
groups above eleven, by all of its nearest).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash
from cwcl_jax.data.order import GlobalOrder
from cwcl_jax.data.sources import Embedded
from cwcl_jax.evaluation.runner import run_tasks
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.losses.short_names import loss_fields
from cwcl_jax.reproduction.measures import Spread, difference
from cwcl_jax.training import sharding
from cwcl_jax.training.encode import EncodeFunctions, Encoder
from cwcl_jax.training.features import training_source
from cwcl_jax.training.kept_rows import KeptRows
from cwcl_jax.training.state import Blueprint, Leaves, TrainState, initialise, make_blueprint
from cwcl_jax.training.step import TrainStep

if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    flags.declare_key_flag("config")
    _LOSSES = flags.DEFINE_list("losses", ["contrastive", "affine"], "Short names, see losses.")
    _SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of heads and order.", lower_bound=1)
    _BATCHES = flags.DEFINE_list("batches", [], "Batch sizes, learning rate in proportion.")
    _GROUP = flags.DEFINE_integer("group", 1, "Near duplicates that come together.", lower_bound=1)
    _OUTPUT = flags.DEFINE_string("output", "heads.json", "File of all results; it is continued.")

_CHUNK = 100
_NEAREST = 10
Rows = Int[np.ndarray, "steps b"]
Chunk = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Features:
    """The training data after both encoders."""

    u: Float[np.ndarray, "n k"]
    v: Float[np.ndarray, "n f"]


def read_features(config: ExperimentConfig) -> Features:
    """Features of both modalities of `config.data.train`, computed now where they are missing."""
    source = training_source(config)
    stores = source.stores if isinstance(source, Embedded) else {}
    if set(stores) != set(config.towers):
        raise ConfigError(
            "heads are compared on features of locked encoders: use a config with both encoders "
            "locked and data.keep_locked_features=True, such as speech_cwcl.py:head,init=RUN"
        )
    arrays = {}
    for modality, store in stores.items():
        vectors = [store[i][1] for i in range(len(store))]
        width = store.description.shape[0]
        arrays[modality] = np.stack([np.full(width, np.nan) if v is None else v for v in vectors])
    usable = np.all([np.isfinite(array).all(axis=1) for array in arrays.values()], axis=0)
    u, v = (arrays[modality][usable].astype(np.float32) for modality in config.modalities)
    return Features(u, v)


def batches(features: Features, config: ExperimentConfig, *, group: int) -> Iterator[Rows]:
    """Rows of the training data, some steps at a time; a function of the seed alone."""
    count, size = len(features.u), config.global_batch_size
    check_batch(count, size, group)
    anchors = size // group
    order = GlobalOrder((count,), (float(count),), count, config.seed)
    nearest = nearest_rows(features.u, _neighbours(group)) if group > 1 else None
    per_epoch = count // anchors
    for first in range(0, config.total_steps, _CHUNK):
        chosen = []
        for step in range(first, min(first + _CHUNK, config.total_steps)):
            epoch, place = divmod(step, per_epoch)
            rows = order.indices(epoch, np.arange(place * anchors, (place + 1) * anchors))
            if nearest is not None:
                draws = np.random.default_rng((config.seed, step))
                picked = draws.permuted(nearest[rows], axis=1)[:, : group - 1]
                rows = np.concatenate([rows[:, None], picked], axis=1).ravel()
            chosen.append(rows)
        yield np.stack(chosen)


def check_batch(count: int, size: int, group: int) -> None:
    """Raises ConfigError unless batches of `size` can be made of `count` rows."""
    if size % group:
        raise ConfigError(f"--group={group} does not divide the batch of {size}")
    least = max(size // group, _neighbours(group) + 1 if group > 1 else 1)
    if count < least:
        raise ConfigError(
            f"a batch of {size} in groups of {group} needs {least} rows, the training data has "
            f"{count}: lower --batches or --group"
        )


def _neighbours(group: int) -> int:
    return max(_NEAREST, group - 1)


def nearest_rows(u: Float[np.ndarray, "n k"], wanted: int) -> Int[np.ndarray, "n {wanted}"]:
    """The nearest other rows by cosine."""
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    found = []
    for first in range(0, len(unit), 1024):
        cosine = unit[first : first + 1024] @ unit.T
        cosine[np.arange(len(cosine)), first + np.arange(len(cosine))] = -2
        found.append(np.argpartition(-cosine, wanted, axis=1)[:, :wanted])
    return np.concatenate(found)


def make_chunk(blueprint: Blueprint) -> Chunk:
    """`state, metrics = chunk(state, locked, u, v, rows)`: a scan over steps on given features."""
    u_name, v_name = blueprint.config.modalities
    train_step = TrainStep(blueprint)

    def chunk(state: TrainState, locked: Leaves, u: Any, v: Any, rows: Any) -> Any:
        def step(state: TrainState, rows: Any) -> tuple[TrainState, Any]:
            batch = {u_name: {"embeds": u[rows]}, v_name: {"embeds": v[rows]}}
            return train_step.update(state, locked, batch)

        state, metrics = jax.lax.scan(step, state, rows)
        return state, {name: values[-1] for name, values in metrics.items()}

    return jax.jit(chunk)


class HeadRuns:
    """Trains and evaluates heads for one config; features and programs are shared."""

    def __init__(self, config: ExperimentConfig, *, group: int = 1):
        self.config = config
        self.group = group
        self.features = read_features(config)
        self._arrays = jax.device_put((self.features.u, self.features.v))
        self._mesh = sharding.make_mesh(config.mesh, jax.local_devices()[:1])
        self._chunks: dict[Any, Chunk] = {}
        self._functions: EncodeFunctions | None = None
        self._kept: KeptRows | None = None

    def run(self, short: str, seed: int, batch: int) -> dict[str, float]:
        """Metrics of one head, with the last step's diagnostics as `train/NAME`."""
        config = variant(self.config, short, seed, batch)
        blueprint = make_blueprint(config, self._mesh)
        state, locked, sources = initialise(blueprint)
        chunk = self._chunks.setdefault((short, batch), make_chunk(blueprint))
        metrics: Mapping[str, Any] = {}
        for rows in batches(self.features, config, group=self.group):
            state, metrics = chunk(state, locked, *self._arrays, jnp.asarray(rows))
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        self._functions = self._functions or EncodeFunctions(blueprint)
        encoder = Encoder(self._functions, state.params, locked, config.total_steps)
        self._kept = self._kept or KeptRows(encoder, sources)
        self._kept.encoder = encoder
        results = run_tasks(config.evaluation, encode=self._kept.encode, data=config.data)
        self._kept.save()
        return values | {name: v for result in results for name, v in result.flat().items()}


def variant(config: ExperimentConfig, short: str, seed: int, batch: int) -> ExperimentConfig:
    """The config with another loss, seed and batch (learning rate in proportion, same samples).

    Raises:
      ConfigError: there is no such loss, or no such batch.
    """
    if batch < 1:
        raise ConfigError(f"--batches={batch}: a batch has at least one pair")
    try:
        loss = dataclasses.replace(config.loss, **loss_fields(short))
    except ValueError as error:
        raise ConfigError(f"--losses={short}: {error}") from error
    factor = batch / config.global_batch_size
    rate = config.optimizer.learning_rate * factor
    tasks = {
        name: dataclasses.replace(task, bootstrap=0)
        for name, task in config.evaluation.tasks.items()
    }
    return dataclasses.replace(
        config,
        seed=seed,
        global_batch_size=batch,
        total_steps=max(1, round(config.total_steps / factor)),
        loss=loss,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        evaluation=dataclasses.replace(config.evaluation, tasks=tasks),
    )


def compare(
    records: list[dict[str, Any]], metrics: list[str], baseline: str = "contrastive"
) -> Table:
    """Means over seeds, and differences to the baseline with the same seed and batch."""
    settings = list(dict.fromkeys((r["loss"], r["batch"], r["group"]) for r in records))
    columns = [_column(records, metrics, setting, baseline) for setting in settings]
    header = ("", *(_label(*setting) for setting in settings))
    rows = zip(("seeds", *metrics), *columns, strict=True)
    note = f"In brackets: minus {baseline} with the same seeds, 95 % interval over seeds (t)."
    return Table("heads on one trunk", header, tuple(rows), (note,))


def _label(loss: str, batch: int, group: int) -> str:
    return f"{loss}, {batch}" + f" in groups of {group}" * (group > 1)


def _column(
    records: list[dict[str, Any]], metrics: list[str], setting: tuple[str, int, int], baseline: str
) -> list[str]:
    """The number of seeds, then every metric, of one loss and batch."""
    loss, batch, group = setting
    own = {r["seed"]: r["metrics"] for r in records if _is(r, loss, batch, group)}
    base = {r["seed"]: r["metrics"] for r in records if _is(r, baseline, batch, group)}
    common = sorted(set(own) & set(base)) if loss != baseline else []
    cells = [str(len(own))]
    for metric in metrics:
        cell = f"{100 * np.mean([values[metric] for values in own.values()]):.1f}"
        if len(common) > 1:
            pairs = [Spread(tuple(100 * r[s][metric] for s in common)) for r in (base, own)]
            gain = difference(*pairs)
            low, high = gain.interval or (gain.mean, gain.mean)
            told = f"{low:+.1f} to {high:+.1f}" if gain.interval else "in every seed"
            cell += f" ({gain.mean:+.1f}: {told})"
        cells.append(cell)
    return cells


def _is(record: Mapping[str, Any], loss: str, batch: int, group: int) -> bool:
    return (record["loss"], record["batch"], record["group"]) == (loss, batch, group)


def headline(records: list[dict[str, Any]]) -> list[str]:
    """The metrics that the table shows."""
    wanted = ("top1", "top5", "top1_general", "_R@1", "_R@10", "structure_correlation")
    names = records[0]["metrics"]
    return [n for n in names if not n.startswith("train/") and "text_top" not in n
            and any(n.endswith(end) for end in wanted)]  # fmt: skip


def read_records(output: Path, settings: str) -> list[dict[str, Any]]:
    """The heads that an earlier command left. The folder of `output` is made.

    Raises:
      ConfigError: the file cannot be continued. Heads of another config cannot stand in one table
        with these.
    """
    try:
        # Now: a head that has been trained is to find its place.
        output.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output={output} cannot be continued: {error}") from error
    if any(record.get("settings") != settings for record in records):
        raise ConfigError(f"{output} holds heads of another config: name another --output")
    return records


def main(argv: list[str]) -> int:
    """Runs what is missing in the output file, and prints the table."""
    del argv
    config = cli.resolve_config(_CONFIG)
    sizes = cli.whole_numbers("batches", _BATCHES.value) or [config.global_batch_size]
    for batch, short in itertools.product(sizes, _LOSSES.value):
        variant(config, short, 0, batch)  # what cannot be, before anything is trained
    output, settings = Path(_OUTPUT.value), config_hash(config)
    records = read_records(output, settings)
    done = {(r["loss"], r["batch"], r["group"], r["seed"]) for r in records}
    runs: HeadRuns | None = None
    for seed, batch, short in itertools.product(range(_SEEDS.value), sizes, _LOSSES.value):
        if (short, batch, _GROUP.value, seed) in done:
            continue
        runs = runs or _runs(config, sizes)
        start = time.perf_counter()
        metrics = runs.run(short, seed, batch)
        record = {"loss": short, "batch": batch, "group": _GROUP.value, "seed": seed}
        records.append(record | {"settings": settings, "metrics": metrics})
        temporary = output.with_suffix(".unfinished")
        temporary.write_text(json.dumps(records, indent=1))
        temporary.replace(output)
        print(f"{short} batch {batch} seed {seed}: {time.perf_counter() - start:.0f} s")
    print(compare(records, headline(records)).text())
    return cli.DONE


def _runs(config: ExperimentConfig, sizes: list[int]) -> HeadRuns:
    runs = HeadRuns(config, group=_GROUP.value)
    for size in sizes:
        check_batch(len(runs.features.u), size, _GROUP.value)
    return runs


if __name__ == "__main__":
    cli.run(main)
