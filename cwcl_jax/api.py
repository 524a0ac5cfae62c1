"""A trained model in a notebook:

model = cwcl_jax.load_model("runs/lit_cwcl")
images = model.encode_image(["cat.jpg", "dog.jpg"])
texts = model.encode_text(["a photo of a cat", "a photo of a dog"])
print(model.similarity(images, texts))
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from cwcl_jax import compiling
from cwcl_jax.copies import local_copy
from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.files import parse_json
from cwcl_jax.modalities import ImageInputs, Modality, TextInputs
from cwcl_jax.modalities.features import only_features
from cwcl_jax.modalities.tokenizer import TextTokenizer
from cwcl_jax.models.leaves import ModelDef
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.paths import to_path
from cwcl_jax.pretrained import PAIRS, complete, import_tower, logits_of
from cwcl_jax.pretrained.folder import (
    DESCRIPTION,
    ModelDescription,
    check_code_is_allowed,
    load_folder,
)

Audio = str | Path | bytes | tuple[np.ndarray, int]
Picture = str | Path | bytes | Image.Image | np.ndarray | jax.Array


class Model:
    """Towers with the preparation of their inputs.

    `encode_items` takes users' items (paths, PIL images, strings, arrays), `encode` takes prepared
    arrays; both return unit vectors in float32, one row each. `encode_image`, `encode_text` and
    `encode_speech` are `encode_items` for the tower that reads such items.
    """

    def __init__(
        self, model_def: ModelDef, leaves: Mapping[str, Any], description: ModelDescription
    ) -> None:
        """Builds the model from a definition, its leaves by path, and a description."""
        self.description = description
        self.leaves = dict(leaves)
        self._encoders = {name: _encoder(model_def, name) for name in description.towers}
        towers = model_def.merge(self.leaves).towers
        self._widths = {name: towers[name].feature_width for name in description.towers}
        for name, tower in description.towers.items():
            settings = tower.encoder_settings()
            description.inputs[name].check(
                settings, options=f"inputs.{name}", overrides=f"towers.{name}", imported=False
            )

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers, in the loss's order."""
        return tuple(self.description.towers)

    @property
    def inverse_temperature(self) -> float:
        """The factor of the cosines in the logits."""
        return float(np.exp(np.asarray(self.leaves["logit_scale"], np.float32)))

    def process(self, tower: str, items: Any) -> dict[str, np.ndarray]:
        """Returns the arrays that a tower reads, by name, for one item or many.

        Raises:
          BadExample: an item cannot be used; the message has its path or its number in the list.
        """
        inputs = self._inputs(tower)
        return inputs.batch(inputs.listed(items))

    def process_image(self, images: Picture | Sequence[Picture]) -> dict[str, np.ndarray]:
        """Returns `pixels` of pictures: paths, encoded bytes, PIL images or uint8 arrays.

        Arrays have the shape (y, x, 3).

        Raises:
          BadExample: a picture cannot be decoded; the message has its path or its number in the
              list.
        """
        return self.process(self._reader_of("image"), images)

    def process_text(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Returns `tokens` and `mask` of texts."""
        return self.process(self._reader_of("text"), texts)

    def process_speech(self, recordings: Audio | Sequence[Audio]) -> dict[str, np.ndarray]:
        """Returns `waveform` and `length` of recordings: paths, encoded bytes, or (samples, rate).

        Samples are int16, or floats in [-1, 1]; any rate, one channel (n,) or several (n, c).

        Raises:
          BadExample: a recording cannot be decoded; the message has its path or its number in the
              list.
        """
        return self.process(self._reader_of("speech"), recordings)

    def encode_image(
        self,
        images: Picture | Sequence[Picture],
        *,
        batch_size: int = 64,
        errors: str = "raise",
    ) -> Float[np.ndarray, "b d"]:
        """Returns the embeddings of pictures, (b, d); see `encode_items`."""
        tower = self._reader_of("image")
        return self.encode_items(tower, images, batch_size=batch_size, errors=errors)

    def encode_text(
        self, texts: str | Sequence[str], *, batch_size: int = 256, errors: str = "raise"
    ) -> Float[np.ndarray, "b d"]:
        """Returns the embeddings of texts, (b, d); see `encode_items`."""
        tower = self._reader_of("text")
        return self.encode_items(tower, texts, batch_size=batch_size, errors=errors)

    def encode_speech(
        self,
        recordings: Audio | Sequence[Audio],
        *,
        batch_size: int = 32,
        errors: str = "raise",
    ) -> Float[np.ndarray, "b d"]:
        """Returns the embeddings of recordings, (b, d); see `encode_items`."""
        tower = self._reader_of("speech")
        return self.encode_items(tower, recordings, batch_size=batch_size, errors=errors)

    def encode_items(
        self, tower: str, items: Any, *, batch_size: int = 64, errors: str = "raise"
    ) -> Float[np.ndarray, "b d"]:
        """Returns the embeddings of one item or many, float32 (b, d) with unit rows.

        Args:
          tower: name of the tower.
          items: paths, arrays and other items that the tower's modality accepts.
          batch_size: number of items in one call of the encoder.
          errors: "raise" at an item that cannot be read; "skip" gives it a row of NaN and a
              warning, so that rows and items still correspond.

        Raises:
          BadExample: an item cannot be used; the message has its path or its number in the list.
          ValueError: there is no such tower, or the items are of another kind.
        """
        inputs = self._inputs(tower)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        listed = inputs.listed(items)
        if not listed:
            return self._no_rows()
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors={errors!r} must be 'raise' or 'skip'")
        _warn_of_losses(inputs, listed)
        if errors == "raise":
            return np.concatenate(
                [
                    self.encode(tower, inputs.batch(listed[i : i + batch_size], first=i))
                    for i in range(0, len(listed), batch_size)
                ]
            )
        return self._encode_usable(tower, listed, batch_size)

    def _encode_usable(self, tower: str, items: Sequence[Any], size: int) -> np.ndarray:
        """Returns a row for every item, NaN for items that cannot be used."""
        inputs, bad = self._inputs(tower), []
        embeds = np.full((len(items), self.description.embed_dim), np.nan, np.float32)
        for start in range(0, len(items), size):
            rows: dict[int, dict[str, np.ndarray]] = {}
            for number, item in enumerate(items[start : start + size], start):
                try:
                    rows[number] = inputs.batch([item], first=number)
                except (BadExample, OSError, ValueError) as error:
                    bad.append(str(error))
            if rows:
                names = inputs.arrays()
                joined = {k: np.concatenate([row[k] for row in rows.values()]) for k in names}
                embeds[list(rows)] = self.encode(tower, joined)
        if bad:
            warnings.warn(
                f"{len(bad)} of {len(items)} items cannot be used and have rows of NaN; the first: "
                f"{bad[0]}",
                stacklevel=4,
            )
        return embeds

    def encode(self, tower: str, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "b d"]:
        """Returns the embeddings of one batch of arrays by name, as returned by `process`.

        `{"features": (b, f)}` are features of the encoder; only the head is applied to them.
        """
        names = self._inputs(tower).arrays()
        if not (only_features(inputs) or names.keys() <= inputs.keys()):
            raise ValueError(
                f"the {tower} tower ({self.description.towers[tower].encoder}) reads "
                f"{' and '.join(names)}, not {' and '.join(inputs) or 'nothing'}"
            )
        self._check_shapes(tower, inputs)
        count = len(next(iter(inputs.values())))
        if not count:
            return self._no_rows()
        # Batches are padded to a power of two, because every new size is compiled again.
        rows = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)
        padded = {name: jnp.asarray(np.asarray(array)[rows]) for name, array in inputs.items()}
        return np.asarray(self._encoders[tower](self.leaves, padded))[:count]

    def _check_shapes(self, tower: str, inputs: Mapping[str, Any]) -> None:
        """Raises ValueError if the arrays do not have the shapes that the tower reads."""
        modality = self._inputs(tower)
        if only_features(inputs):
            wanted = {"features": (self._widths[tower],)}
        else:
            wanted = {name: tuple(spec.shape) for name, spec in modality.arrays().items()}
        # If padding can be trimmed, rows may be shorter.
        exact = type(modality).trim is Modality.trim
        counts = {len(inputs[name]) for name in wanted if np.ndim(inputs[name])}
        for name, shape in wanted.items():
            found = np.shape(inputs[name])
            if len(found) != 1 + len(shape) or (exact and found[1:] != shape) or len(counts) > 1:
                raise ValueError(
                    f"the {tower} tower reads {name} of shape {('b', *shape)}, one row per item: "
                    f"not {found}".replace("'b'", "b")
                )

    def similarity(
        self, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, "n m"]:
        """Returns the cosines between rows, which must have unit norm, as embeddings have.

        Multiply them by `inverse_temperature` for the logits.
        """
        return np.asarray(a, np.float32) @ np.asarray(b, np.float32).T

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tower's tokenizer."""
        inputs: Any = self._inputs(self._reader_of("text"))
        return inputs.loaded

    def _reader_of(self, modality: str) -> str:
        """Returns the name of the tower that reads a modality."""
        found = [
            name for name, inputs in self.description.inputs.items() if inputs.name == modality
        ]
        if len(found) != 1:
            raise ValueError(
                f"{' and '.join(found)} read {modality}: name one, model.encode_items(TOWER, ...)"
                if found
                else f"the model has no {modality} tower; it has {' and '.join(self.towers)}"
            )
        return found[0]

    def _inputs(self, tower: str) -> Modality:
        if tower not in self.description.inputs:
            raise ValueError(f"the model has no {tower} tower; it has {' and '.join(self.towers)}")
        return self.description.inputs[tower]

    def _no_rows(self) -> np.ndarray:
        return np.zeros((0, self.description.embed_dim), np.float32)


def _warn_of_losses(inputs: Modality, items: Sequence[Any]) -> None:
    """Warns how many of the items are truncated or otherwise only partly read."""
    if type(inputs).lost is Modality.lost:
        return
    remarks: Counter[str] = Counter()
    for item in items:
        with suppress(BadExample, OSError, ValueError):  # reported when it is encoded
            remarks.update(inputs.lost(inputs.opened(item)))
    for remark, count in remarks.items():
        warnings.warn(f"{count} of {len(items)} items are {remark}", stacklevel=4)


def _encoder(model_def: ModelDef, tower: str) -> Callable[[Any, Any], jax.Array]:
    @partial(jax.jit, compiler_options=compiling.options())
    def encode(leaves: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> jax.Array:
        return model_def.merge(leaves).towers[tower](inputs)

    return encode


def _is_pair(config: Path) -> bool:
    if not config.is_file():
        return False
    content = parse_json(config.read_bytes())
    return isinstance(content, dict) and content.get("model_type") in PAIRS


def load_model(
    path: str | Path,
    *,
    step: int | str | None = None,
    weights: str = "trained",
    allow_code: bool = False,
    interpolate: float | None = None,
) -> Model:
    """Loads an exported folder, a run's workdir (by default its latest step), or a CLIP model.

    A CLIP model is a folder in which transformers' `CLIPModel` or `SiglipModel` was saved, with its
    tokenizer.

    Args:
      path: the folder.
      step: a checkpoint of a run, or "best" for the one that its `checkpoint.best` kept.
      weights: "trained", or "ema" for a run's moving averages of the weights.
      allow_code: whether user modules that the model names ("module:Class") may be imported, which
          runs their code.
      interpolate: for a run, a share between 0, the weights that its towers started from, and 1,
          the trained weights (WiSE-FT, arXiv 2109.01903).

    Returns:
      The model.

    Raises:
      PermissionError: the model names such modules, and `allow_code` is False.
      FileNotFoundError: `path` is none of these.
      ValueError: a `step` of an exported folder, a folder whose files do not fit together, or
          `interpolate` without start weights or with random ones.
    """
    folder = to_path(path).expanduser()
    is_run = (folder / "config.json").exists() and (folder / "checkpoints").is_dir()
    if interpolate is not None and not is_run:
        raise ValueError(
            f"{folder} is not the workdir of a run: interpolate={interpolate} needs one, for the "
            "weights that its towers started from"
        )
    if not is_run and folder.exists():
        folder = local_copy(folder)
    if (folder / DESCRIPTION).exists():
        if step is not None or weights != "trained":
            given = f"step={step}" if step is not None else f"weights={weights}"
            raise ValueError(
                f"{folder} is an exported model, which has one step: leave out {given}, or give "
                "the workdir of the run"
            )
        description, leaves = load_folder(folder, allow_code=allow_code)
        return Model(description.abstract()[0], leaves, description)
    if is_run:
        check_code_is_allowed(folder / "config.json", allow_code)
        return Model(*load_run(folder, step, weights, interpolate=interpolate))
    if _is_pair(folder / "config.json"):
        return Model(*load_pair(folder))
    found = "does not exist" if not folder.exists() else f"holds neither {DESCRIPTION}"
    raise FileNotFoundError(
        f"{folder} {found}{'' if not folder.exists() else ' nor config.json and checkpoints/'}: "
        "give the workdir of a run that has saved a checkpoint, or a folder written by "
        "python -m cwcl_jax.export"
    )


def load_embeddings(folder: str | Path) -> tuple[list[str], Float[np.ndarray, "n d"]]:
    """Returns ids and vectors written by `python -m cwcl_jax.embed`, in the order of the source.

    Returns:
      The ids, and float32 rows; rows of NaN for examples that could not be used.

    Raises:
      FileNotFoundError: there is no such folder, or it is incomplete.
    """
    store = EmbeddingStore(folder)
    vectors = np.full((len(store), *store.description.shape), np.nan, np.float32)
    ids = []
    for row in range(len(store)):
        name, vector = store[row]
        ids.append(name)
        if vector is not None:
            vectors[row] = vector
    return ids, vectors


def load_pair(folder: Path) -> tuple[ModelDef, dict[str, jax.Array], ModelDescription]:
    """Returns definition, leaves and description of a CLIP or SigLIP that transformers saved."""
    content = parse_json((folder / "config.json").read_bytes())
    kind = content["model_type"]
    # SigLIP's projection is inside its encoders, because it has a bias.
    head = "linear" if kind == "clip" else "none"
    towers = {
        name: complete(TowerConfig(encoder, weights=str(folder), tune="none", head=head))
        for name, encoder in PAIRS[kind].items()
    }
    image, text = (tower.encoder_settings() for tower in towers.values())
    inputs = {
        "image": ImageInputs(size=image.image_size).of_folder(folder),
        "text": TextInputs(tokenizer=str(folder), max_tokens=text.max_tokens),
    }
    embed_dim = content.get("projection_dim", 512) if kind == "clip" else image.width
    logits = logits_of(str(folder))
    description = ModelDescription(
        towers, embed_dim=embed_dim, inputs=inputs, logit_bias="logit_bias" in logits
    )
    definition, abstract = description.abstract()
    leaves = {name: jnp.asarray(value) for name, value in logits.items()}
    for name, tower in towers.items():
        leaves |= import_tower(tower, name, abstract).leaves
    return definition, leaves, description


def load_run(
    workdir: Path,
    step: int | str | None = None,
    weights: str = "trained",
    *,
    interpolate: float | None = None,
) -> tuple[ModelDef, dict[str, jax.Array], ModelDescription]:
    """Returns definition, leaves and description of a run's model, on the default device.

    LoRA's additions are merged into the kernels. `interpolate` is as in `load_model`.
    """
    from cwcl_jax.training.encode import restore
    from cwcl_jax.training.interpolation import interpolated
    from cwcl_jax.training.own_code import code_of

    one = jax.local_devices()[:1]
    restored = restore(workdir, step, weights=weights, devices=one, compact=False)
    blueprint = restored.blueprint
    config = blueprint.config
    code = code_of(config, ("towers",))["towers"]
    description = ModelDescription(
        towers=config.towers,
        embed_dim=config.embed_dim,
        dtype=config.dtype,
        logit_bias="logit_bias" in blueprint.abstract,
        inputs={tower: config.data.inputs_of(tower) for tower in config.towers},
        origin={"run": config.name, "loss": config.loss.name, "step": restored.step}
        | ({"weights": weights} if weights != "trained" else {})
        | ({"code": code} if code else {})
        | ({"interpolate": interpolate} if interpolate is not None else {}),
    )
    leaves = restored.plain if interpolate is None else interpolated(restored, interpolate)
    return blueprint.model_def.plain, leaves, description
