"""The training data with the features of locked encoders, made before the first step and kept.

The same as `python -m cwcl_jax.embed` and `embeds=` in the source line, without the two commands:
`data.keep_locked_features=True`. The folder lies in the cache and is named after all that decides
the vectors, so another run with the same encoder and data finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.sources import Embedded, Source, open_source
from cwcl_jax.training import sharding
from cwcl_jax.training.checks import check_inputs
from cwcl_jax.training.embedding import describe, embed_source
from cwcl_jax.training.encode import Encoder, imported_encoder
from cwcl_jax.training.state import make_blueprint

_BATCH = 256
_SHARD = 8192


def training_source(config: ExperimentConfig, beat: Callable[[], None] = lambda: None) -> Source:
    """The source of `config.data.train`, with features of the locked encoders if it asks for them.

    Args:
      beat: called now and then while features are made: the watchdog's.

    Raises:
      ConfigError: the data is not the same in every epoch.
      FileNotFoundError, ValueError: the data cannot be read.
    """
    source = open_source(config.data.train, cache_dir=config.data.cache_dir)
    if not config.data.keep_locked_features:
        return source
    blueprint = make_blueprint(
        config, sharding.make_mesh(config.mesh, jax.local_devices()), check_batch=False
    )
    locked = [
        modality
        for modality, tower in config.towers.items()
        if blueprint.features_are_locked(modality)
        and tower.encoder != "precomputed"
        and modality not in getattr(source, "embedded", ())
    ]
    if not locked:
        return source
    _check_repeatable(config, locked)
    check_inputs(config)
    encoder, sources = imported_encoder(config, devices=jax.local_devices())
    folders = []
    for modality in locked:
        description = describe(
            encoder, sources, source, modality, output="features", dtype="float32",
            width=encoder.width(modality, "features"), shard_size=_SHARD,
        )  # fmt: skip
        folders.append(_keep(config, encoder, source, description, beat))
    return Embedded(source, folders)


def cache_folder(config: ExperimentConfig) -> Path:
    """Where features are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cwcl_jax"
    return (Path(config.data.cache_dir) if config.data.cache_dir else home) / "features"


def _check_repeatable(config: ExperimentConfig, locked: list[str]) -> None:
    image = config.data.image
    if "image" in locked and (image.crop_min_area or image.flip):
        raise ConfigError(
            "config.data.keep_locked_features=True needs pictures that are the same in every "
            f"epoch, but crop_min_area={image.crop_min_area} and flip={image.flip}; switch these "
            "off, or set keep_locked_features=False"
        )


def _keep(
    config: ExperimentConfig,
    encoder: Encoder,
    source: Source,
    description: EmbeddingDescription,
    beat: Callable[[], None],
) -> str:
    """Writes what is missing of the folder; other processes of this machine wait for it."""
    name = hashlib.sha256(description.to_json().encode()).hexdigest()[:16]
    folder = cache_folder(config) / f"{description.modality}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), beat):
        writer = EmbeddingWriter(folder, description)
        if not writer.is_complete():
            print(f"features of the locked {description.modality} encoder, once, into {folder}")
            encoder.on_batch = beat
            embed_source(
                encoder, source, writer, config.data,
                output="features", batch_size=_BATCH, progress=_report, stop=lambda step: False,
            )  # fmt: skip
    return str(folder)


@contextmanager
def _locked(file: Path, beat: Callable[[], None]) -> Iterator[None]:
    with open(file, "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                beat()  # whoever holds it is watched by a watchdog of its own
                time.sleep(0.5)
        yield


def _report(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else "\r"
        rate = done / max(seconds, 1e-9)
        print(f"{done}/{total} embedded, {rate:.0f}/s", end=end, file=sys.stderr, flush=True)
