"""A trained model in a notebook:

model = cwcl_jax.load_model("runs/lit_cwcl-cwcl")
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
from cwcl_jax.data.text import TextTokenizer, load_tokenizer
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.leaves import ModelDef
from cwcl_jax.pretrained.folder import DESCRIPTION, ModelDescription, load_folder

Audio = str | Path | bytes | tuple[np.ndarray, int]
Picture = str | Path | bytes | Image.Image | np.ndarray


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
        """`pixels` of pictures: paths, encoded bytes, PIL images, or uint8 arrays (y, x, 3)."""
        options = self.description.image
        return {"pixels": np.stack([eval_pixels(_picture(x), options) for x in _listed(images)])}

    def process_text(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """`tokens` and `mask` of texts."""
        return dict(self.tokenizer(_listed(texts)))

    def process_speech(self, recordings: Audio | Sequence[Audio]) -> dict[str, np.ndarray]:
        """`waveform` and `length` of recordings: paths, encoded bytes, or (samples, rate) pairs.

        Samples are int16, or floats in [-1, 1]; any rate, one channel (n,) or several (n, c).
        """
        options = self.description.speech
        clips = [waveform(_recording(x), options) for x in _listed(recordings)]
        return {name: np.stack([clip[name] for clip in clips]) for name in ("waveform", "length")}

    def encode_image(
        self, images: Picture | Sequence[Picture], *, batch_size: int = 64
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of pictures."""
        return self._encode_all("image", self.process_image, _listed(images), batch_size)

    def encode_text(
        self, texts: str | Sequence[str], *, batch_size: int = 256
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of texts."""
        return self._encode_all("text", self.process_text, _listed(texts), batch_size)

    def encode_speech(
        self, recordings: Audio | Sequence[Audio], *, batch_size: int = 32
    ) -> Float[np.ndarray, "b d"]:
        """Embeds of recordings."""
        return self._encode_all("speech", self.process_speech, _listed(recordings), batch_size)

    def encode(self, modality: str, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "b d"]:
        """Embeds of one batch of arrays, as a `process_...` gives them."""
        if modality not in self._encoders:
            raise ValueError(
                f"the model has no {modality} tower; it has {' and '.join(self.modalities)}"
            )
        count = len(next(iter(inputs.values())))
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

    def _encode_all(
        self, modality: str, process: Callable[[Any], Any], items: list[Any], batch_size: int
    ) -> np.ndarray:
        if modality not in self._encoders:
            return self.encode(modality, {})
        if not items:
            return np.zeros((0, self.description.embed_dim), np.float32)
        starts = range(0, len(items), batch_size)
        batches = [self.encode(modality, process(items[i : i + batch_size])) for i in starts]
        return np.concatenate(batches)

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


def _listed(items: Any) -> list[Any]:
    """One item as a list of one."""
    single = isinstance(items, (str, bytes, Path, Image.Image, tuple))
    single = single or (isinstance(items, np.ndarray) and items.ndim == 3)
    return [items] if single else list(items)


def _picture(item: Picture) -> bytes | Image.Image:
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[-1] != 3:
            raise ValueError(
                f"an image array is uint8 (y, x, 3), not {item.dtype} {item.shape}: convert it"
            )
        return Image.fromarray(item)
    return Path(item).read_bytes() if isinstance(item, (str, Path)) else item


def _recording(item: Audio) -> bytes | tuple[np.ndarray, int]:
    if isinstance(item, tuple):
        samples, rate = np.asarray(item[0]), int(item[1])
        if samples.ndim == 2:
            samples = samples.mean(axis=1)
        if samples.dtype.kind == "f" and np.asarray(item[0]).dtype.kind == "f":
            samples = np.clip(samples, -1, 1) * 32767
        return np.rint(samples).astype(np.int16), rate
    return Path(item).read_bytes() if isinstance(item, (str, Path)) else item


def load_model(path: str | Path, *, step: int | None = None) -> Model:
    """Load an exported folder, or a run's workdir at a step (by default its latest checkpoint)."""
    folder = Path(path).expanduser()
    if (folder / DESCRIPTION).exists():
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
    """Definition, leaves and description of a run's model."""
    from cwcl_jax.training import sharding
    from cwcl_jax.training.checkpoint import Checkpoints
    from cwcl_jax.training.state import locked_leaves, make_blueprint
    from cwcl_jax.training.workdir import check_same_sources, load_config

    config = load_config(workdir)
    mesh = sharding.make_mesh(type(config.mesh)())
    blueprint = make_blueprint(config, mesh, check_batch=False)
    with Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        found = checkpoints.latest_step if step is None else step
        if found is None:
            raise FileNotFoundError(f"{workdir} holds no checkpoint: train it first")
        params = checkpoints.restore_params(found, blueprint.abstract_params)
    locked, sources = locked_leaves(blueprint)
    check_same_sources(workdir, sources, config)
    description = ModelDescription(
        towers=config.towers,
        embed_dim=config.embed_dim,
        dtype=config.dtype,
        logit_bias="logit_bias" in blueprint.abstract,
        image=config.data.image,
        text=config.data.text,
        speech=config.data.speech,
        origin={"run": config.name, "loss": config.loss.name, "step": found},
    )
    return blueprint.model_def, params | locked, description
