"""Runs an encoder over sources and sentences, in batches of one shape.

The encoder is a callable `encode(modality, inputs) -> embeds`. Every batch has the same size, the
last one is padded by repeating, so that nothing is compiled twice; padding is dropped here.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from cwcl_jax.data.image import decode_rgb, open_image
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.text import load_tokenizer

Encode = Callable[[str, Mapping[str, np.ndarray]], np.ndarray]


@dataclass
class Clock:
    """Seconds by what they went into."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class View:
    """Some examples of a source, in a given order; `crop_border` pixels are cut off pictures.

    Pictures to be cut may have `max_pixels`, as `data.image.max_pixels` has it for all others.
    """

    def __init__(
        self,
        source: Source,
        indices: Int[np.ndarray, "n"],
        *,
        max_pixels: int,
        crop_border: int = 0,
    ):
        self.source = source
        self.indices = indices
        self.max_pixels = max_pixels
        self.crop_border = crop_border
        self.class_names = source.class_names
        # Modalities whose embeddings the source brings, in place of raw inputs.
        self.embedded: Sequence[str] = getattr(source, "embedded", ())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._cropped(self.source[int(self.indices[index])])

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        return self._cropped(self.source.read(int(self.indices[index]), fields))

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint()}-{chosen}-{self.crop_border}"

    def _cropped(self, example: dict[str, Any]) -> dict[str, Any]:
        if self.crop_border and "image" in example:
            cut = crop_border(example["image"], self.crop_border, max_pixels=self.max_pixels)
            example = {**example, "image": cut}
        return example


def crop_border(image: bytes | Image.Image, border: int, *, max_pixels: int) -> Image.Image:
    """`image` (encoded or opened) without `border` pixels on every side.

    Raises:
      BadExample: it cannot be read, has more than `max_pixels`, or nothing of it would be left.
    """
    opened = open_image(image, max_pixels)
    width, height = opened.size
    if min(width, height) <= 2 * border:
        raise BadExample("image too small", f"{width}x{height}, crop_border={border} leaves none")
    decode_rgb(opened)  # in place: what cannot be decoded is refused here, and not by crop
    return opened.crop((border, border, width - border, height - border))


def encode_sentences(
    sentences: Sequence[str],
    *,
    encode: Encode,
    data: DataConfig,
    batch_size: int,
    clock: Clock,
    tower: str = "text",
) -> Float[np.ndarray, "n d"]:
    """Embeddings of `sentences`; equal sentences are encoded once."""
    if not sentences:
        raise ValueError("no sentences to encode: the prompts or captions are empty.")
    place = {sentence: at for at, sentence in enumerate(dict.fromkeys(sentences))}
    distinct, tokenizer = list(place), load_tokenizer(data.text)
    parts = []
    for start in range(0, len(distinct), batch_size):
        chosen = distinct[start : start + batch_size]
        inputs = tokenizer(chosen + chosen[-1:] * (batch_size - len(chosen)))
        begin = time.perf_counter()
        parts.append(np.asarray(encode(tower, inputs), np.float32)[: len(chosen)])
        clock.add("encode", begin)
    embeds = np.concatenate(parts)
    return embeds[[place[sentence] for sentence in sentences]]


@dataclass(frozen=True)
class Items:
    """Embeddings of examples of a source, in its order, and what the source says about them."""

    embeds: Float[np.ndarray, "n d"]
    index: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]  # -1 where there is none
    captions: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.embeds)


def encode_items(
    batches: Iterable[Mapping[str, Any]], modality: str, *, encode: Encode, clock: Clock
) -> Items:
    """Embeds one modality of `batches` (see `data.pipeline.eval_batches`) and drops the filling."""
    parts: dict[str, list] = {"embeds": [], "index": [], "label": [], "captions": [], "id": []}
    waiting = time.perf_counter()
    for batch in batches:
        clock.add("data", waiting)
        begin = time.perf_counter()
        encoded = np.asarray(encode(modality, batch[modality]), np.float32)
        clock.add("encode", begin)
        valid = np.flatnonzero(batch["valid"])
        parts["embeds"].append(encoded[valid])
        for name in ("index", "label"):
            parts[name].append(np.asarray(batch[name])[valid])
        parts["captions"] += [tuple(batch["captions"][i]) for i in valid]
        parts["id"] += [str(batch["id"][i]) for i in valid]
        waiting = time.perf_counter()
    if not parts["id"]:
        raise ValueError(f"the source gave no usable example of modality {modality!r}.")
    return Items(
        np.concatenate(parts["embeds"]),
        np.concatenate(parts["index"]).astype(np.int64),
        np.concatenate(parts["label"]).astype(np.int64),
        tuple(parts["captions"]),
        tuple(parts["id"]),
    )
