"""The training data with the features of locked encoders, made before the first step and kept.

The same as `python -m cwcl_jax.embed` and `embeds=` in the source line, without the two commands:
`data.keep_locked_features=True`. The folder lies in the cache and is named after all that decides
the vectors, so another run with the same encoder and data finds it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.options import cache_home
from cwcl_jax.data.processing import usable_captions
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Embedded, Source, open_source
from cwcl_jax.files import locked
from cwcl_jax.training import sharding
from cwcl_jax.training.checks import check_inputs
from cwcl_jax.training.embedding import describe, embed_source
from cwcl_jax.training.encode import Encoder, imported_encoder
from cwcl_jax.training.state import make_blueprint

_BATCH = 256
_SHARD = 8192
# Whether examples have several captions is a matter of the source: a few of them tell.
_LOOKED_AT = 100


def training_source(config: ExperimentConfig, beat: Callable[[], None] = lambda: None) -> Source:
    """The source of `config.data.train`, with features of the locked encoders if it asks for them.

    Args:
      beat: called now and then while features are made: the watchdog's.

    Raises:
      ConfigError: the data is not the same in every epoch.
      FileNotFoundError, ValueError: the data cannot be read.
    """
    source = open_source(config.data.train, cache_dir=config.data.cache_dir)
    embedded = [
        modality
        for modality in getattr(source, "embedded", ())
        if modality in config.towers and config.towers[modality].encoder != "precomputed"
    ]
    _check_repeatable(config, embedded, source, "embeds=")
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
    _check_repeatable(config, locked, source, "config.data.keep_locked_features=True")
    check_inputs(blueprint.config)
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
    return cache_home(config.data.cache_dir) / "features"


def _check_repeatable(
    config: ExperimentConfig, modalities: Sequence[str], source: Source, asked: str
) -> None:
    """Raises ConfigError where the inputs of a modality vary, but one vector stands for them."""
    image, speech = config.data.image, config.data.speech
    varied = ""
    if "image" in modalities and (image.crop_min_area or image.flip):
        varied = (
            f"config.data.image.crop_min_area={image.crop_min_area} and flip={image.flip} change "
            "the pictures; set them to 0 and False"
        )
    elif "speech" in modalities and speech.random_crop and _may_be_cut(config, source):
        varied = (
            "config.data.speech.random_crop=True changes the windows of recordings longer than "
            f"max_seconds={speech.max_seconds}; set it to False"
        )
    elif "text" in modalities and (found := _with_several_captions(source)):
        varied = f"{found}, of which every epoch takes another one; keep one caption an example"
    if varied:
        raise ConfigError(
            f"{asked} needs inputs that are the same in every epoch, but {varied}, or do without "
            f"{asked}"
        )


def _may_be_cut(config: ExperimentConfig, source: Source) -> bool:
    durations = getattr(source, "durations", None)
    return durations is None or bool(durations.max() > config.data.speech.max_seconds)


def _with_several_captions(source: Source) -> str:
    """Which example has several captions, out of some spread over the source; "" if none."""
    for index in np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int):
        try:
            example = source.read(int(index), ("text",))
            captions = usable_captions(example.get("text") or "")
        except BadExample:
            continue
        if len(set(captions)) > 1:
            return f"{example['id']} has {len(captions)} captions"
    return ""


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
    # Whoever holds the lock is watched by a watchdog of its own.
    with locked(folder.with_suffix(".lock"), waiting=beat):
        writer = EmbeddingWriter(folder, description)
        if not writer.is_complete():
            print(f"features of the locked {description.modality} encoder, once, into {folder}")
            encoder.on_batch = beat
            embed_source(
                encoder, source, writer, config.data,
                output="features", batch_size=_BATCH, progress=_report, stop=lambda step: False,
            )  # fmt: skip
    return str(folder)


def _report(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else "\r"
        rate = done / max(seconds, 1e-9)
        print(f"{done}/{total} embedded, {rate:.0f}/s", end=end, file=sys.stderr, flush=True)
