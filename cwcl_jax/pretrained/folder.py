"""An exported model: a folder with `cwcl_jax.json`, `model.safetensors` and maybe a tokenizer.

It holds everything that encoding needs and nothing of the training. Its `model.safetensors` can
also initialise a tower of another run.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwcl_jax.extension import CodeError, code_hash, is_missing_code, is_reference
from cwcl_jax.files import parse_json, replacing
from cwcl_jax.modalities import Modality, modality_class
from cwcl_jax.models.encoders import modality_of
from cwcl_jax.models.leaves import ModelDef, abstract_split
from cwcl_jax.models.rngs import fresh_rngs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.models.two_towers import build_two_towers
from cwcl_jax.weights.failures import WeightsMismatch
from cwcl_jax.weights.locate import sha256_of, write_sha256
from cwcl_jax.weights.readers import open_weights
from cwcl_jax.weights.writers import write_safetensors

DESCRIPTION = "cwcl_jax.json"
WEIGHTS = "model.safetensors"
# 1: inputs by modality (image, text, speech); 2: inputs by tower.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """A model without its weights."""

    towers: Mapping[str, TowerConfig]
    embed_dim: int
    dtype: str = "float32"
    logit_bias: bool = False
    inputs: Mapping[str, Modality] = dataclasses.field(default_factory=dict)
    """How the inputs of each tower are prepared."""
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where the model came from: the run, its step, the sources of its towers."""

    def abstract(self) -> tuple[ModelDef, dict[str, Any]]:
        """Returns the model's definition and the shapes of its leaves."""
        return abstract_split(
            lambda: build_two_towers(
                self.towers,
                {tower: self.inputs[tower].arrays() for tower in self.towers},
                embed_dim=self.embed_dim,
                inverse_temperature=1.0,
                logit_bias=0.0 if self.logit_bias else None,
                dtype=self.dtype,
                rngs=fresh_rngs(0),
            )
        )


def save_folder(folder: Path, description: ModelDescription, leaves: Mapping[str, Any]) -> None:
    """Writes a model; the description comes last, so a folder that has one is complete.

    Files that the inputs need, such as a tokenizer, are written too. The attention kernel depends
    on the machine and is left to the machine that loads the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: x.packed(folder, name) for name, x in description.inputs.items()}
    towers = {
        modality: dataclasses.replace(tower, attention="auto")
        for modality, tower in description.towers.items()
    }
    write_safetensors(folder / WEIGHTS, leaves, metadata={"format": "np"})
    write_sha256(folder / WEIGHTS)
    written = dataclasses.replace(description, inputs=inputs, towers=towers)
    content = {"format": _FORMAT} | dataclasses.asdict(written)
    with replacing(folder / DESCRIPTION) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_folder(
    folder: Path, *, allow_code: bool = False
) -> tuple[ModelDescription, dict[str, jax.Array]]:
    """Reads the files of `save_folder`; returns description and leaves, on the default device.

    Raises:
      PermissionError: the model names a user's modules, and `allow_code` is False.
      WeightsMismatch: the weights do not fit the description.
      ValueError: the weights are damaged.
    """
    description = read_description(folder, allow_code=allow_code)
    _, abstract = description.abstract()
    sha256_of(folder / WEIGHTS)  # raises if the file was damaged since
    weights = open_weights(folder / WEIGHTS)
    wrong = [
        f"{path} (shape {weights.entries[path].shape}, expected {leaf.shape})"
        for path, leaf in abstract.items()
        if path in weights.entries and weights.entries[path].shape != leaf.shape
    ]
    missing = [path for path in abstract if path not in weights.entries]
    unexpected = [path for path in weights.entries if path not in abstract]
    if wrong or missing or unexpected:
        raise WeightsMismatch(
            weights.source,
            f"does not fit {folder / DESCRIPTION}",
            missing=missing,
            unexpected=unexpected,
            wrong=wrong,
            remedy="export the model again",
        )
    return description, {path: jnp.asarray(weights.read(path)) for path in abstract}


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with tuples for lists: JSON has no tuples, and the settings have no lists."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def read_description(folder: Path, *, allow_code: bool = False) -> ModelDescription:
    """Returns the description of an exported folder, with the full paths of its files.

    Raises:
      PermissionError: the model names a user's modules, and `allow_code` is False.
      ValueError: the file is not a description of a model.
    """
    path = folder / DESCRIPTION
    try:
        content = parse_json(path.read_bytes())
        version = content.pop("format")
        towers = {name: TowerConfig(**fields) for name, fields in content.pop("towers").items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a description of a model: {error!r}") from error
    if version not in (1, _FORMAT):
        raise ValueError(f"{path}: format {version}, this version reads {_FORMAT}: update cwcl_jax")
    check_code_is_allowed(path, allow_code)
    try:
        kinds = {n: modality_class(t.modality or modality_of(t.encoder)) for n, t in towers.items()}
        if version == 1:
            by_modality = {name: content.pop(name) for name in ("image", "text", "speech")}
            given = {name: by_modality.get(kind.name, {}) for name, kind in kinds.items()}
        else:
            given = content.pop("inputs")
        inputs = {
            name: kind(**_with_tuples(given.get(name, {})))
            .fitted(towers[name].overrides)
            .unpacked(folder)
            for name, kind in kinds.items()
        }
        description = ModelDescription(towers=towers, inputs=inputs, **content)
    except (ValueError, TypeError, KeyError) as error:
        if is_missing_code(error):
            raise CodeError(f"{path} names code that cannot be imported: {error}") from error
        raise ValueError(f"{path}: not a description of a model: {error!r}") from error
    _check_same_code(path, description)
    return description


def _check_same_code(file: Path, description: ModelDescription) -> None:
    """Raises CodeError if the user's code changed since the model was exported."""
    for name, then in description.origin.get("code", {}).items():
        if code_hash(name) != then:
            raise CodeError(
                f"{file}: the code of {name} changed since the model was exported: restore it, "
                "export again, or remove origin.code from this file to take it as it is now"
            )


def check_code_is_allowed(file: Path, allow_code: bool) -> None:
    """Raises PermissionError if a file names modules that would be imported."""
    content = parse_json(file.read_bytes())
    tasks = content.get("evaluation", {}).get("tasks", {})
    named = [
        part[field]
        for part in [*content.get("towers", {}).values(), *tasks.values(), content.get("loss", {})]
        for field in ("modality", "encoder", "kind", "name", "weight_function")
        if is_reference(part.get(field) or "")
    ]
    if named and not allow_code:
        raise PermissionError(
            f"{file} names code that is not part of this package: {', '.join(sorted(set(named)))}. "
            "Loading it would import and run these modules; if you trust them, pass allow_code=True"
        )


def below(leaves: Mapping[str, Any], modality: str) -> dict[str, np.ndarray]:
    """Returns one tower's leaves by path below it, with separate layers, in float32."""
    prefix = f"towers/{modality}/"
    stack = "encoder/blocks/"
    result: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        if not path.startswith(prefix):
            continue
        name = path.removeprefix(prefix)
        array = np.asarray(leaf).astype(np.float32)
        tail = name.removeprefix(stack)
        if name.startswith(stack) and not tail.split("/")[0].isdecimal():
            result |= {f"{stack}{i}/{tail}": layer for i, layer in enumerate(array)}
        else:
            result[name] = array
    return result
