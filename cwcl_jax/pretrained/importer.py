"""Imports a tower's weights: locate, recognise, plan, check, and only then read and place."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwcl_jax.extension import is_reference
from cwcl_jax.models.encoders import ENCODERS, encoder_family
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.folder_config import (
    check_kind,
    check_settings,
    explain_sizes,
    sentence_parts,
)
from cwcl_jax.weights.failures import WeightsMismatch
from cwcl_jax.weights.locate import locate, sha256_of
from cwcl_jax.weights.readers import Weights, open_weights
from cwcl_jax.weights.rules import Layout, Plan, Rule, fill, make_plan
from cwcl_jax.weights.sentence_folder import WithDense, encoder_folder
from cwcl_jax.weights.views import unstacked, without_prefix


@dataclasses.dataclass(frozen=True)
class ImportedTower:
    """The leaves of a tower that came from a file, and their origin."""

    leaves: dict[str, jax.Array]
    """By full path, `towers/<modality>/...`, in the dtypes that the tower requested."""
    source: str
    sha256: str
    initialised: tuple[str, ...]
    """Full paths of leaves that the file does not hold: they keep their initial values."""
    ignored: tuple[str, ...]
    """Names in the file that were left out by rule: a classifier, a decoder."""


def import_tower(
    config: TowerConfig,
    modality: str,
    abstract: Mapping[str, Any],
    *,
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> ImportedTower:
    """Returns the leaves of one tower, read from `config.weights`.

    Args:
      config, modality, abstract: as for `planned_import`.
      put: as for `PlannedImport.read`.

    Raises:
      WeightsMismatch: the file does not fit the tower.
    """
    return planned_import(config, modality, abstract).read(put)


@dataclasses.dataclass(frozen=True)
class PlannedImport:
    """An import that was checked and has read no array yet."""

    weights: Weights
    view: Weights
    plan: Plan
    paths: tuple[Path, ...]
    """The files or folders that the arrays come from."""
    prefix: str
    leaves: Mapping[str, Any]
    """Shapes and dtypes by path below the prefix."""

    def read(self, put: Callable[[str, np.ndarray], jax.Array] | None = None) -> ImportedTower:
        """Returns the leaves.

        Args:
          put: places one array at its path, for example with its sharding; by default on the
              default device. It is called leaf by leaf, so that only one array is in memory twice.
        """
        digest = sha256_of(*self.paths)
        place = put if put is not None else _on_default_device
        result = {}
        # All layers of one kind in sequence, so that an array of stacked layers is read once.
        for assignment in sorted(self.plan.assignments, key=lambda x: _any_layer(x.target)):
            path = self.prefix + assignment.target
            result[path] = place(path, fill(self.view, assignment, self.leaves[assignment.target]))
        return ImportedTower(
            leaves=result,
            source=self.weights.source,
            sha256=digest,
            initialised=tuple(self.prefix + p for p in self.plan.initialised),
            ignored=self.plan.ignored,
        )


def planned_import(
    config: TowerConfig, modality: str, abstract: Mapping[str, Any]
) -> PlannedImport:
    """Returns how the leaves of one tower come from `config.weights`.

    Args:
      config: the tower, whose `weights` names a file, a folder or a hub id.
      modality: the tower's name, which starts its paths.
      abstract: shapes and dtypes of the model's leaves by full path; other towers' are skipped.

    Raises:
      WeightsMismatch: the file does not fit the tower.
    """
    path = encoder_files(locate(config.weights))
    check_kind(path, config.encoder)
    prefix = f"towers/{modality}/"
    leaves = {p.removeprefix(prefix): x for p, x in abstract.items() if p.startswith(prefix)}
    weights = open_weights(path)
    layout = recognise(weights, config.encoder, modality)
    view = layout.view(weights)
    dense = _dense_folders(path, config)
    if dense:
        view = WithDense(view, dense)
        layout = dataclasses.replace(layout, rules=[*layout.rules, _DENSE])
    try:
        plan = make_plan(view, layout, leaves)
    except WeightsMismatch as error:
        if is_reference(config.encoder):
            raise
        raise error.explained(explain_sizes(path, config)) from None
    if not is_reference(config.encoder):
        check_settings(path, config)
    return PlannedImport(weights, view, plan, (path, *dense), prefix, leaves)


# The dense layers of a sentence-transformers model, in addition to the encoder's own names.
_DENSE = Rule(r"dense/(\d+)/linear/(kernel|bias)", r"encoder/dense/\1/linear/\2")


def encoder_files(path: Path) -> Path:
    """Returns the folder of the encoder's files: a subfolder in older sentence encoders."""
    return encoder_folder(path) if path.is_dir() else path


def _dense_folders(path: Path, config: TowerConfig) -> tuple[Path, ...]:
    """Returns the folders with the weights of the tower's dense layers, if it uses the folder's."""
    if config.encoder not in ENCODERS or not getattr(config.encoder_settings(), "dense", ""):
        return ()
    return sentence_parts(path, config).dense_folders


def folder_of(weights: str) -> Path:
    """Returns the folder that contains the `weights` of a tower."""
    path = locate(weights)
    return path if path.is_dir() else path.parent


def logits_of(weights: str) -> dict[str, np.ndarray]:
    """Returns logit scale and bias (float32 scalars) of a file that holds both towers."""
    opened = open_weights(locate(weights))
    return {
        name: np.asarray(opened.read(name), np.float32).reshape(())
        for name in ("logit_scale", "logit_bias")
        if name in opened.entries
    }


def _any_layer(target: str) -> str:
    return re.sub(r"^(encoder/blocks)/\d+/", r"\1/", target)


def _on_default_device(path: str, array: np.ndarray) -> jax.Array:
    del path
    return jnp.asarray(array)


def own_layout(modality: str) -> Layout:
    """Returns the layout of our own exports: names are the paths, scanned layers are separate."""

    def view(weights: Weights) -> Weights:
        plain = without_prefix(weights, f"towers/{modality}/")
        return unstacked(plain, r"(encoder/blocks)(/[a-z].*)", joint="/")

    return Layout(
        name="cwcl_jax",
        signature=r"towers/.+",
        view=view,
        rules=[
            Rule(r"(head/.+)", r"\1", optional=True),
            Rule(r"encoder/position_embedding", "encoder/position_embedding", "grid"),
            Rule(r"(encoder/.+)", r"\1"),
        ],
        ignore=[r"towers/.+", r"logit_(scale|bias)"],
    )


def _layout_of_paths() -> Layout:
    """Returns the layout of a user's file, whose names are the paths of the user's module."""
    return Layout(
        name="paths of the module's leaves",
        signature=r"(?!towers/).+",
        rules=[Rule(r"(.+)", r"encoder/module/\1")],
    )


def recognise(weights: Weights, encoder: str, tower: str) -> Layout:
    """Returns the layout whose signature matches the file's names.

    Raises:
      WeightsMismatch: it is not a file for this encoder; the message says what was found.
    """
    if is_reference(encoder):
        exported = own_layout(tower)
        return exported if _signed(exported, weights) else _layout_of_paths()
    family = encoder_family(encoder)
    possible = [own_layout(tower), *family.layouts]
    for layout in possible:
        if _signed(layout, weights):
            return layout
    others = {
        layout.name: name
        # A joint file matches two encoders; that of this tower's modality comes first.
        for name in sorted(ENCODERS, key=lambda name: ENCODERS[name].modality != family.modality)
        for layout in ENCODERS[name].layouts
        if name != encoder and _signed(layout, weights)
    }
    looks = f"it looks like a {next(iter(others))} file" if others else "no known kind of file"
    first = next(iter(weights.entries), "nothing at all")
    remedy = f"known for encoder {encoder!r}: {', '.join(layout.name for layout in possible)}"
    if others:
        remedy += f"; or set the tower's encoder to {next(iter(others.values()))!r}"
    raise WeightsMismatch(
        weights.source,
        f"is not a file for encoder {encoder!r}: {looks} (its first array is {first!r})",
        remedy=remedy,
    )


def _signed(layout: Layout, weights: Weights) -> bool:
    return any(re.fullmatch(layout.signature, name) for name in weights.entries)
