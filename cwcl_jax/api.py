"""A trained model in a notebook:

model = cwcl_jax.load_model("runs/lit_cwcl")
images = model.encode_image(["cat.jpg", "dog.jpg"])
texts = model.encode_text(["a photo of a cat", "a photo of a dog"])
print(model.similarity(images, texts))
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from cwcl_jax.data.audio import waveform
from cwcl_jax.data.image import eval_pixels
from cwcl_jax.data.items import (
    listed_pictures,
    listed_recordings,
    listed_texts,
    open_picture,
    open_recording,
    prepare_each,
)
from cwcl_jax.data.text import TextTokenizer, load_tokenizer
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.leaves import ModelDef
from cwcl_jax.pretrained.folder import DESCRIPTION, ModelDescription, load_folder

Audio = str | Path | bytes | tuple[np.ndarray, int]
Picture = str | Path | bytes | Image.Image | np.ndarray | jax.Array

# What a `process_...` gives to a tower.
_INPUTS = {
    "image": ("pixels",),
    "text": ("tokens", "mask"),
    "speech": ("waveform", "length"),
}


class Model:
    """Two towers with the processors of their inputs.

    Every `encode_...` takes one item or a list and gives unit vectors in float32, one row each.
    """

    def __init__(
        self, model_def: ModelDef, leaves: Mapping[str, Any], description: ModelDescription
    ) -> None:
        """Build from a definition, its leaves by path, and the description of towers and inputs."""
        self.description = description
        self.leaves = dict(leaves)
        self._encoders = {
            modality: _encoder(model_def, modality) for modality in description.towers
        }
        self._tokenizer: TextTokenizer | None = None
        self._check_vocabulary()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the towers."""
        return tuple(self.description.towers)

    @property
    def inverse_temperature(self) -> float:
        """The factor of the cosines in the logits."""
        return float(np.exp(np.asarray(self.leaves["logit_scale"], np.float32)))

    def process_image(self, images: Picture | Sequence[Picture]) -> dict[str, np.ndarray]:
        """`pixels` of pictures: paths, encoded bytes, PIL images, or uint8 arrays (y, x, 3).

        Raises:
          BadExample: a picture that cannot be decoded, by its path or its number in the list.
        """
        return self._process("image", listed_pictures(images))

    def process_text(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """`tokens` and `mask` of texts."""
        return self._process("text", listed_texts(texts))

    def process_speech(self, recordings: Audio | Sequence[Audio]) -> dict[str, np.ndarray]:
        """`waveform` and `length` of recordings: paths, encoded bytes, or (samples, rate) pairs.

        Samples are int16, or floats in [-1, 1]; any rate, one channel (n,) or several (n, c).

        Raises:
          BadExample: a recording that cannot be decoded, by its path or its number in the list.
        """
        return self._process("speech", listed_recordings(recordings))

    def encode_image(
        self, images: Picture | Sequence[Picture], *, batch_size: int = 64
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of pictures."""
        return self._encode_all("image", listed_pictures(images), batch_size)

    def encode_text(
        self, texts: str | Sequence[str], *, batch_size: int = 256
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of texts."""
        return self._encode_all("text", listed_texts(texts), batch_size)

    def encode_speech(
        self, recordings: Audio | Sequence[Audio], *, batch_size: int = 32
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of recordings."""
        return self._encode_all("speech", listed_recordings(recordings), batch_size)

    def encode(self, modality: str, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "b d"]:
        """Embeds of one batch of arrays, as a `process_...` gives them.

        `{"embeds": (b, f)}` are features of the encoder, to which only the head is applied.
        """
        self._check_modality(modality)
        names = self._input_names(modality)
        if not ({"embeds"} <= inputs.keys() or set(names) <= inputs.keys()):
            raise ValueError(
                f"the {modality} tower ({self.description.towers[modality].encoder}) reads "
                f"{' and '.join(names)}, not {' and '.join(inputs) or 'nothing'}"
            )
        count = len(next(iter(inputs.values())))
        if not count:
            return self._no_rows()
        # Batches grow to a power of two: a new size would be compiled anew.
        rows = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)
        padded = {name: jnp.asarray(np.asarray(array)[rows]) for name, array in inputs.items()}
        return np.asarray(self._encoders[modality](self.leaves, padded))[:count]

    def similarity(
        self, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, "n m"]:
        """Cosines between rows of embeds; `inverse_temperature` times them are the logits."""
        return np.asarray(a, np.float32) @ np.asarray(b, np.float32).T

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tower's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.description.text)
        return self._tokenizer

    def _encode_all(self, modality: str, items: list[Any], batch_size: int) -> np.ndarray:
        self._check_modality(modality)
        if self._input_names(modality) == ("embeds",):
            raise ValueError(
                f"the {modality} tower is 'precomputed', it reads embeddings of another encoder: "
                f'model.encode("{modality}", {{"embeds": array}})'
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not items:
            return self._no_rows()
        starts = range(0, len(items), batch_size)
        return np.concatenate(
            [
                self.encode(modality, self._process(modality, items[i : i + batch_size], first=i))
                for i in starts
            ]
        )

    def _process(self, modality: str, items: list[Any], first: int = 0) -> dict[str, np.ndarray]:
        """Inputs of a tower; `first` is the number of the first item in the caller's list."""
        description = self.description
        if modality == "text":
            return dict(self.tokenizer(items))
        if modality == "image":
            pixels = prepare_each(
                lambda x: eval_pixels(open_picture(x), description.image), items, first
            )
            return {"pixels": np.stack(pixels)}
        clips = prepare_each(
            lambda x: waveform(open_recording(x), description.speech), items, first
        )
        return {name: np.stack([clip[name] for clip in clips]) for name in _INPUTS["speech"]}

    def _input_names(self, modality: str) -> tuple[str, ...]:
        encoder = self.description.towers[modality].encoder
        return ("embeds",) if encoder == "precomputed" else _INPUTS[modality]

    def _no_rows(self) -> np.ndarray:
        return np.zeros((0, self.description.embed_dim), np.float32)

    def _check_modality(self, modality: str) -> None:
        if modality not in self._encoders:
            raise ValueError(
                f"the model has no {modality} tower; it has {' and '.join(self.modalities)}"
            )

    def _check_vocabulary(self) -> None:
        tower = self.description.towers.get("text")
        if tower is None:
            return
        settings = encoder_config(tower.encoder, tower.preset, tower.overrides, tower.pooling)
        size = getattr(settings, "vocab_size", None)
        if size is not None and self.tokenizer.vocab_size > size:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name!r} has {self.tokenizer.vocab_size} tokens, "
                f"the text tower's table {size}: name the tokenizer that the tower was trained with"
            )


def _encoder(model_def: ModelDef, modality: str) -> Callable[[Any, Any], jax.Array]:
    @jax.jit
    def encode(leaves: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> jax.Array:
        return model_def.merge(leaves).towers[modality](inputs)

    return encode


def load_model(path: str | Path, *, step: int | None = None) -> Model:
    """Load an exported folder, or a run's workdir at a step (by default its latest checkpoint).

    Raises:
      FileNotFoundError: `path` is neither.
      ValueError: a `step` of an exported folder, or a folder whose files do not fit together.
    """
    folder = Path(path).expanduser()
    if (folder / DESCRIPTION).exists():
        if step is not None:
            raise ValueError(
                f"{folder} is an exported model, which has one step: leave out step={step}, or "
                "give the workdir of the run"
            )
        description, leaves = load_folder(folder)
        return Model(description.abstract()[0], leaves, description)
    if (folder / "config.json").exists() and (folder / "checkpoints").is_dir():
        return Model(*load_run(folder, step))
    found = "does not exist" if not folder.exists() else f"holds neither {DESCRIPTION}"
    raise FileNotFoundError(
        f"{folder} {found}{'' if not folder.exists() else ' nor config.json and checkpoints/'}: "
        "give the workdir of a run that has saved a checkpoint, or a folder written by "
        "python -m cwcl_jax.export"
    )


def load_run(
    workdir: Path, step: int | None = None
) -> tuple[ModelDef, dict[str, jax.Array], ModelDescription]:
    """Definition, leaves and description of a run's model, on the default device."""
    from cwcl_jax.training.encode import restore

    restored = restore(workdir, step, devices=jax.local_devices()[:1])
    blueprint = restored.blueprint
    config = blueprint.config
    description = ModelDescription(
        towers=config.towers,
        embed_dim=config.embed_dim,
        dtype=config.dtype,
        logit_bias="logit_bias" in blueprint.abstract,
        image=config.data.image,
        text=config.data.text,
        speech=config.data.speech,
        origin={"run": config.name, "loss": config.loss.name, "step": restored.step},
    )
    return blueprint.model_def, restored.params | restored.locked, description
