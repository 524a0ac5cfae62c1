"""Writes one ONNX file per tower, from raw inputs to unit vectors, with a free batch size.

jax2onnx translates the traced computation. It pins an older orbax-checkpoint than training needs,
so it is not an extra of this package and must be installed without its dependencies.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.pretrained.folder import DESCRIPTION, ModelDescription

_INSTALL = "pip install --no-deps jax2onnx onnx onnx-ir onnxruntime ml_dtypes"


def write_onnx(folder: Path, description: ModelDescription, leaves: Mapping[str, Any]) -> None:
    """Writes `<modality>.onnx` for each tower, and the description next to them.

    Raises:
      ValueError: jax2onnx is missing, or cannot translate a tower.
    """
    try:
        from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"format onnx needs jax2onnx ({error}): {_INSTALL}") from error
    towers = {
        modality: dataclasses.replace(tower, attention="xla", remat="none")
        for modality, tower in description.towers.items()
    }
    definition, _ = dataclasses.replace(description, towers=towers).abstract()
    model = definition.merge(leaves)
    folder.mkdir(parents=True, exist_ok=True)
    for modality in towers:
        inputs = _inputs(description, modality)
        names = list(inputs)
        tower = model.towers[modality]

        def encode(*arrays: jax.Array, tower: Any = tower, names: list[str] = names) -> jax.Array:
            return tower(dict(zip(names, arrays, strict=True)))

        target = folder / f"{modality}.onnx"
        try:
            to_onnx(
                encode,
                [inputs[name] for name in names],
                model_name=f"cwcl_jax_{modality}",
                input_names=names,
                output_names=["embeds"],
                return_mode="file",
                output_path=target,
            )
        except Exception as error:
            target.unlink(missing_ok=True)
            raise ValueError(
                f"jax2onnx cannot translate the {modality} tower ({type(error).__name__}: "
                f"{str(error)[:200]}): export as safetensors"
            ) from error
    content = json.dumps(dataclasses.asdict(description), indent=2, sort_keys=True)
    (folder / DESCRIPTION).with_suffix(".onnx.json").write_text(content + "\n")


def _inputs(description: ModelDescription, tower: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a tower's inputs with a symbolic batch size."""
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    return {
        name: jax.ShapeDtypeStruct((batch, *spec.shape), jnp.dtype(spec.dtype))
        for name, spec in description.inputs[tower].arrays().items()
    }
