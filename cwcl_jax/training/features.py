"""The training data, checked, with features of locked encoders if the settings ask for them.

`data.keep_locked_features=True` does the same as `python -m cwcl_jax.embed` and `features_from=` in
the source line, without the two commands: the folder is in the feature cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.composers import ComposerError, features_read
from cwcl_jax.data.options import given_as_features, reads_features
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.skipping import ALWAYS_ALLOWED
from cwcl_jax.data.sources import (
    Embedded,
    Mixture,
    Source,
    check_training_line,
    open_source,
    parse_source_line,
)
from cwcl_jax.data.survey import Loss, survey, survey_labels, too_few, too_much
from cwcl_jax.data.views import kept_draws, with_several_variants
from cwcl_jax.modalities import Modality
from cwcl_jax.modalities.tokenizer import OUTSIDE_SCENES
from cwcl_jax.training import sharding
from cwcl_jax.training.checks import check_inputs
from cwcl_jax.training.distributed import is_primary
from cwcl_jax.training.embedding import folder_description, from_cache
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.feature_cache import keep
from cwcl_jax.training.state import make_blueprint


def training_source(config: ExperimentConfig, beat: Callable[[], None] = lambda: None) -> Source:
    """Returns the source of `config.data.train`, with features of locked encoders if requested.

    Args:
      beat: called now and then while features are computed: the watchdog's.

    Raises:
      ConfigError: the data is not the same in every epoch.
      FileNotFoundError, ValueError: the data cannot be read.
    """
    check_training_line(config.data.train)
    source = open_source(config.data.train, cache_dir=config.data.cache_dir)
    embedded = [tower for tower in config.towers if from_cache(config, tower, source)]
    _check_repeatable(config, embedded, source, "features_from=")
    _check_draws(config, embedded, source)
    check_whole(config, source)
    check_label_sets(config, source)
    if not config.data.keep_locked_features:
        return source
    blueprint = make_blueprint(
        config, sharding.make_mesh(config.mesh, jax.local_devices()), check_batch=False
    )
    locked = [
        tower
        for tower in config.towers
        if blueprint.features_are_locked(tower)
        and not reads_features(config.data.inputs_of(tower))
        and tower not in source.embedded
    ]
    if not locked:
        return source
    _check_repeatable(config, locked, source, "config.data.keep_locked_features=True")
    check_inputs(blueprint.config)
    # Check now, and not after hours of embedding, that batches can be made with these settings.
    # Only a search for neighbours by features that do not exist yet has to wait.
    data = config.data
    if features_read(data.batches) in locked:
        data = dataclasses.replace(data, batches="", validation_composed=False)
    batches = train_batches(
        data,
        config.tower_names,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        source=source,
    )
    batches.check_composed(config.data)
    batches.close()
    parts = source.parts or [source]
    for part in parts:
        _check_draws(config, locked, part)
    encoder, sources = imported_encoder(config, devices=jax.local_devices())

    def with_features(part: Source) -> Source:
        folders = []
        for tower in (tower for tower in locked if tower not in part.embedded):
            description = folder_description(
                encoder, sources, part, tower, output="features", dtype=config.data.kept_dtype
            )
            folders.append(str(keep(config, encoder, part, description, beat)))
        return Embedded(part, folders) if folders else part

    # A mixture stays one, with its shares; other mixtures find the features of its parts.
    made = [with_features(part) for part in parts]
    return Mixture(made, source.weights) if source.parts else made[0]


def composer_refused(config: ExperimentConfig, error: ComposerError) -> str:
    """Returns an error message that names `config.data.batches` and why it cannot be used."""
    return f"config.data.batches={config.data.batches!r}: {error}"


def check_whole(config: ExperimentConfig, source: Source) -> None:
    """Reports what share of the data is truncated on its way to the towers, or cannot be read.

    Raises:
      ConfigError: it is more than `data.max_cut_share`, or far more than `data.max_skipped_share`,
        or a tokenizer cannot be read.
    """
    raw = {
        tower: inputs
        for tower in config.towers
        if not given_as_features(tower, inputs := config.data.inputs_of(tower), source.embedded)
    }
    for tower, inputs in raw.items():
        try:
            inputs.fingerprint()  # reads what it needs, such as a tokenizer
        except ValueError as error:
            raise ConfigError(f"config.data.{tower}: {error}") from error
    losses = survey(source, raw)
    for loss in losses if is_primary() else ():
        print(f"warning: in a sample of the training data {loss}", flush=True)
    bad = too_few(losses, config.data.max_skipped_share)
    if bad:
        raise ConfigError(
            f"in a sample of config.data.train {bad}, a larger share than "
            f"config.data.max_skipped_share={config.data.max_skipped_share}: repair the data, or "
            "raise this limit"
        )
    loss = too_much(losses, config.data.max_cut_share)
    if loss:
        raise ConfigError(
            f"in a sample of config.data.train {loss}, a larger share than "
            f"config.data.max_cut_share={config.data.max_cut_share}: "
            f"{_remedy(config, loss)}, or raise --config.data.max_cut_share"
        )


def check_label_sets(config: ExperimentConfig, source: Source, what: str = "train") -> None:
    """Reports how the sets of labels of the data were parsed.

    Args:
      what: the field of `config.data` that names the source, "train" or "validation".

    Raises:
      ConfigError: no example of a sample has any label, or more of them than may be skipped have
        more than `data.max_labels`.
    """
    line, size = getattr(config.data, what), config.data.max_labels
    if config.data.labels != "sets":
        named = any("labels" in part.options for part in parse_source_line(line))
        if named and is_primary():
            print(
                f"warning: the labels= of config.data.{what} are not read: set "
                "config.data.labels=sets, and a loss that uses labels",
                flush=True,
            )
        return
    found = survey_labels(source, config.data.label_separator)
    if not found.kinds:
        raise ConfigError(
            f"config.data.labels='sets', but no example of a sample of config.data.{what}="
            f"{line!r} has labels: name their columns in the source line, labels=COLUMN"
        )
    too_many = [count for count in found.counts if count > size]
    most = max(found.counts)
    told = (
        f"{len(too_many)} of {len(found.counts)} examples in a sample of config.data.{what} have "
        f"more labels than config.data.max_labels={size}, up to {most}, and would be "
        f"skipped: set --config.data.max_labels={most}"
    )
    expected = len(source) * len(too_many) / len(found.counts)
    if expected > max(ALWAYS_ALLOWED, config.data.max_skipped_share * len(source)):
        raise ConfigError(told)
    if too_many and is_primary():
        print(f"warning: {told}", flush=True)
    if is_primary() and what == "train":
        print(f"training data: {found}", flush=True)


def _remedy(config: ExperimentConfig, loss: Loss) -> str:
    options = f"config.data.{loss.tower}"
    if loss.remark != OUTSIDE_SCENES:
        return f"repair or choose the data, or set a length in {options} that fits it"
    weights = config.towers[loss.tower].weights
    hint = (
        f", for example the one that belongs to the tower's weights, {weights}" if weights else ""
    )
    return f"name a tokenizer for your captions in {options}.tokenizer{hint}"


def _check_repeatable(
    config: ExperimentConfig, towers: Sequence[str], source: Source, asked: str
) -> None:
    """Raises ConfigError if a tower's inputs are different in every epoch, without end."""
    for tower in towers:
        inputs = config.data.inputs_of(tower)
        if not inputs.views and (varied := inputs.varies(source)):
            raise ConfigError(
                f"{asked} needs inputs that are the same in every epoch, but config.data.{tower}: "
                f"{varied}, or leave out {asked}"
            )


def _check_draws(config: ExperimentConfig, towers: Sequence[str], source: Source) -> None:
    """Raises ConfigError if folders hold vectors of other inputs than training would draw."""
    for tower in towers:
        inputs = config.data.inputs_of(tower)
        wanted = kept_draws(tower, inputs)
        for store in source.stores.get(tower, ()):
            draws, several = store.description.draws, ""
            if draws == wanted:
                continue
            if not draws and not inputs.views:
                several = with_several_variants(source, inputs)
                if not several:
                    continue
            raise ConfigError(
                f"features_from={store.folder} holds {store.description.told()} for an example, "
                f"but training draws from {_told(inputs, several)}: make it again with "
                "python -m cwcl_jax.embed and this config, or leave out features_from="
            )


def _told(inputs: Modality, several: str) -> str:
    if inputs.views:
        return f"{inputs.views} views of this config's options"
    return f"its captions ({several})" if several else "no such views"
