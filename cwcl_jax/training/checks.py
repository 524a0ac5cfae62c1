"""Checks that the data's inputs fit the towers, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cwcl_jax.config import ConfigError, ExperimentConfig, refuse
from cwcl_jax.data.options import label_shape, reads_features
from cwcl_jax.data.sources import Source, open_source
from cwcl_jax.data.survey import shape_of_features
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.extension import import_named
from cwcl_jax.losses import make_loss
from cwcl_jax.losses.make import argument_names
from cwcl_jax.losses.options import LossConfig, is_own, resolve
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.importer import recognise
from cwcl_jax.training.embedding import check_features
from cwcl_jax.training.state import Blueprint, TowerSource
from cwcl_jax.weights.locate import locate
from cwcl_jax.weights.readers import open_weights


def check_inputs(config: ExperimentConfig) -> None:
    """Raises ConfigError, with one line each, if the data cannot feed the towers or the loss."""
    problems = [*_of_loss(config)]
    for name, tower in config.towers.items():
        settings = tower.encoder_settings()
        try:
            config.data.inputs_of(name).check(
                settings,
                options=f"config.data.{name}",
                overrides=f"config.towers.{name}.overrides",
                imported=bool(tower.weights),
            )
        except ValueError as error:
            problems.append(_wrong_weights(name, tower) or str(error))
    refuse(problems)


def check_patch_dropout(blueprint: Blueprint) -> None:
    """Raises ConfigError if patch_dropout is set for a locked encoder, which sees all patches."""
    for name, tower in blueprint.config.towers.items():
        share = getattr(tower.encoder_settings(), "patch_dropout", 0.0)
        if share and blueprint.features_are_locked(name):
            raise ConfigError(
                f"config.towers.{name}.overrides.patch_dropout={share} has no effect: the encoder "
                f"is locked (tune={tower.tune!r}), and a locked encoder sees all patches; leave it "
                "out, or train the encoder (tune='all', 'last:K', 'lora:R')"
            )


def _wrong_weights(name: str, tower: TowerConfig) -> str:
    """Returns an error message if a tower's weights belong to another family, else "".

    Such weights imply other sizes and another tokenizer, which are not the cause.
    """
    try:
        if tower.weights:
            recognise(open_weights(locate(tower.weights)), tower.encoder, name)
    except (ValueError, OSError) as error:
        return f"config.towers.{name}.weights={tower.weights!r}: {error}"
    return ""


def _of_loss(config: ExperimentConfig) -> Iterator[str]:
    """Yields what the loss needs but the data lacks, and what the data has but no loss reads."""
    loss, data = resolve(config.loss), config.data
    named = (
        f"config.loss.name={config.loss.name!r} with weight_function={loss.weights.text!r}, "
        f"duplicates={loss.duplicates!r}"
    )
    reads = {"labels": loss.needs_labels, "guide": loss.needs_p}
    if is_own(config.loss.name):
        wanted = argument_names(import_named(config.loss.name, "loss"))
        reads = {"labels": "labels" in wanted, "guide": "p" in wanted}
    if loss.needs_labels and not data.labels:
        yield (
            f"{named} needs labels: set --config.data.labels=class (the source's classes), =text "
            "(pairs with equal captions) or =sets (several per example, labels=COLUMN in the "
            "source line)"
        )
    for option, read in reads.items():
        if getattr(data, option) and not read:
            yield (
                f"config.data.{option}={getattr(data, option)!r} has no effect: {named} does not "
                f"read it. {_READERS[option]}"
            )
    if data.guide and loss.needs_q:
        yield (
            f"config.data.guide={data.guide!r} cannot be combined with config.loss.weighted='own', "
            "which weights each direction by its own modality; use weighted='both'"
        )


# Remedies for data that the loss does not read.
_READERS = {
    "labels": "Losses that do: config.loss.name=supervised or morphoclip; "
    "config.loss.weight_function=labels; config.loss.duplicates=masked or positives. Or leave "
    "config.data.labels out",
    "guide": "Losses that do compute weights from similarities, such as config.loss.name=cwcl, or "
    "mask false negatives by them, such as duplicates=relative0.05. Or leave config.data.guide out",
}


def check_own_loss(blueprint: Blueprint, source: Source) -> None:
    """Raises ConfigError if a user's loss or weight function cannot be trained with."""
    config = blueprint.config
    try:
        if is_own(config.loss.name):
            _try_loss(blueprint, source)
        elif is_own(config.loss.weight_function):
            _try_weights(config.loss)
    except Exception as error:
        field = "name" if is_own(config.loss.name) else "weight_function"
        named = f"config.loss.{field}={getattr(config.loss, field)!r}"
        raise ConfigError(f"{named}: {type(error).__name__}: {error}") from error


def _try_loss(blueprint: Blueprint, source: Source) -> None:
    """Traces the loss for four pairs, without computing it.

    Raises any error of the loss; ValueError if it does not return a float.
    """
    config = blueprint.config
    towers = blueprint.model_def.merge(blueprint.abstract).towers
    widths = [towers[tower].feature_width for tower in config.tower_names]

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    made, _ = jax.eval_shape(
        lambda u, v, p, scale, bias, labels, q, progress: make_loss(config.loss)(
            u, v, p, scale, logit_bias=bias, labels=labels, q=q, progress=progress
        ),
        array(4, config.embed_dim),
        array(4, config.embed_dim),
        array(
            4, *(shape_of_features(source, guide) if (guide := config.data.guide) else widths[:1])
        ),
        array(),
        array() if "logit_bias" in blueprint.abstract else None,
        array(4, *label_shape(config.data), dtype="int32") if config.data.labels else None,
        array(4, widths[1]),
        array(),
    )
    if not jnp.issubdtype(made.dtype, jnp.floating):
        raise ValueError(f"it returns {made.dtype}, but must return a float")


def _try_weights(loss: LossConfig) -> None:
    """Computes the weights of cosines from -1 to 1.

    Raises any error of the function; ValueError if a weight is negative or not finite.
    """
    cosines = jnp.linspace(-1.0, 1.0, 21).reshape(3, 7)
    weights = np.asarray(resolve(loss).weights.function()(cosines, 1.0))
    wrong = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        at = tuple(wrong[0])
        raise ValueError(
            f"the weight of a cosine of {float(cosines[at]):.1f} is {weights[at]:g}; weights must "
            "be finite and at least 0 for cosines from -1 to 1, for example jnp.maximum(weight, 0)"
        )


def check_task_inputs(
    blueprint: Blueprint,
    tasks: Mapping[str, Task],
    sources: Mapping[str, TowerSource],
    step: int,
    leaves: str = "trained",
) -> None:
    """Raises ConfigError if a task would feed a tower with inputs that it does not read.

    Args:
      sources: origin of the towers' weights.
      step: step of the run; 0 at the beginning.
      leaves: "trained", or "ema" for the averages of the trained ones.
    """
    config = blueprint.config
    for name, task in tasks.items():
        partner, reader = (getattr(task, field, "") for field in ("partner", "text_tower"))
        towers = [tower for tower in (task.tower, partner) if tower in config.towers]
        for field in ("source", "train_source"):
            if line := getattr(task, field, ""):
                source = open_source(line, cache_dir=config.data.cache_dir)
                what = f"config.evaluation.tasks.{name}.{field}={line!r}"
                check_features(
                    blueprint, source, sources,
                    towers=towers, what=what, step=step, leaves=leaves,
                )  # fmt: skip
        if reader in config.towers and partner in ("", reader):
            _check_reads_sentences(config, name, reader)


def _check_reads_sentences(config: ExperimentConfig, task: str, tower: str) -> None:
    inputs = config.data.inputs_of(tower)
    if reads_features(inputs):
        return
    try:
        inputs.batch(inputs.listed(["a sentence"]))
    except Exception as error:
        raise ConfigError(
            f"config.evaluation.tasks.{task}.text_tower={tower!r} cannot read sentences "
            f"({type(inputs).__name__}): {error}"
        ) from error
