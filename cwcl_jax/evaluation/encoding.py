"""Runs an encoder over sources and sentences, in batches of one shape.

The encoder is a callable `encode(tower, inputs) -> embeds`. All batches have the same size, so that
nothing is compiled twice: the last one is padded by repetition, and the padding is dropped here.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.data.content import row_keys
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.sources.base import Source, SourceAround
from cwcl_jax.modalities import Modality

Encode = Callable[[str, Mapping[str, np.ndarray]], np.ndarray]


@dataclass
class Clock:
    """Seconds by activity."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class View(SourceAround):
    """Some examples of a source, in a given order; `crop_border` pixels are cut off pictures.

    `inputs` are the modalities of the towers; those with `has_border` do the cropping.
    """

    def __init__(
        self,
        source: Source,
        indices: Int[np.ndarray, "n"],
        *,
        inputs: Mapping[str, Modality],
        crop_border: int = 0,
    ):
        super().__init__(source)
        self.indices = indices
        self.crop_border = crop_border
        self._inputs = inputs

    @property
    def durations(self) -> np.ndarray | None:
        whole = self.source.durations
        return None if whole is None else whole[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        return self._cropped(self.source.read(int(self.indices[index]), fields))

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint()}-{chosen}-{self.crop_border}"

    def _cropped(self, example: dict[str, Any]) -> dict[str, Any]:
        if not self.crop_border:
            return example
        return example | {
            inputs.field: inputs.without_border(example[inputs.field], self.crop_border)
            for inputs in self._inputs.values()
            if inputs.has_border and inputs.field in example
        }


def encode_sentences(
    sentences: Sequence[str],
    *,
    encode: Encode,
    data: DataConfig,
    batch_size: int,
    clock: Clock,
    tower: str = "text",
) -> Float[np.ndarray, "n d"]:
    """Returns the tower's embeddings of `sentences`, (n, d); equal sentences are encoded once."""
    if not sentences:
        raise ValueError("no sentences to encode: the prompts or captions are empty.")
    place = {sentence: at for at, sentence in enumerate(dict.fromkeys(sentences))}
    distinct, reader = list(place), data.inputs_of(tower)
    parts = []
    for start in range(0, len(distinct), batch_size):
        chosen = distinct[start : start + batch_size]
        inputs = reader.batch(chosen + chosen[-1:] * (batch_size - len(chosen)))
        begin = time.perf_counter()
        parts.append(np.asarray(encode(tower, inputs), np.float32)[: len(chosen)])
        clock.add("encode", begin)
    embeds = np.concatenate(parts)
    return embeds[[place[sentence] for sentence in sentences]]


@dataclass(frozen=True)
class Items:
    """Embeddings of examples of a source, in its order, with their labels, captions and ids."""

    embeds: Float[np.ndarray, "n d"]
    index: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]  # -1 without a label
    captions: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    content: tuple[bytes, ...]  # equal for items whose inputs are equal

    def __len__(self) -> int:
        return len(self.embeds)

    def repeats(self) -> Int[np.ndarray, "n"]:
        """Returns for every item the number, from 0, of its distinct content."""
        number: dict[bytes, int] = {}
        return np.array([number.setdefault(key, len(number)) for key in self.content], np.int64)

    def once(self) -> "Items":
        """Returns the items with equal content merged: the first of them, with the captions of all.

        A table with one row per caption repeats a picture with five captions on five rows.
        """
        place = self.repeats()
        _, first = np.unique(place, return_index=True)
        if len(first) == len(self):
            return self
        captions = [self.captions[at] for at in first]
        for at in np.setdiff1d(np.arange(len(self)), first):
            known = captions[place[at]]
            captions[place[at]] = (*known, *(c for c in self.captions[at] if c not in known))
        return Items(
            self.embeds[first],
            self.index[first],
            self.labels[first],
            tuple(captions),
            tuple(self.ids[at] for at in first),
            tuple(self.content[at] for at in first),
        )


def encode_items(
    batches: Iterable[Mapping[str, Any]], tower: str, *, encode: Encode, clock: Clock
) -> Items:
    """Returns the embedded items of `data.pipeline.eval_batches`, without padding rows."""
    parts: dict[str, list] = {
        name: [] for name in ("embeds", "index", "label", "captions", "id", "content")
    }
    waiting = time.perf_counter()
    for batch in batches:
        clock.add("data", waiting)
        begin = time.perf_counter()
        encoded = np.asarray(encode(tower, batch[tower]), np.float32)
        clock.add("encode", begin)
        valid = np.flatnonzero(batch["valid"])
        parts["embeds"].append(encoded[valid])
        for name in ("index", "label"):
            parts[name].append(np.asarray(batch[name])[valid])
        parts["captions"] += [tuple(batch["captions"][i]) for i in valid]
        parts["id"] += [str(batch["id"][i]) for i in valid]
        keys = row_keys(batch[tower])
        parts["content"] += [keys[i] for i in valid]
        waiting = time.perf_counter()
    if not parts["id"]:
        raise ValueError(f"the source gave no usable example for the tower {tower!r}.")
    return Items(
        np.concatenate(parts["embeds"]),
        np.concatenate(parts["index"]).astype(np.int64),
        np.concatenate(parts["label"]).astype(np.int64),
        tuple(parts["captions"]),
        tuple(parts["id"]),
        tuple(parts["content"]),
    )
