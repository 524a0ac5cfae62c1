"""From what a source gives to the arrays that the towers take, one example and one batch."""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cwcl_jax.data.audio import waveform
from cwcl_jax.data.buckets import batch_lengths
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.image import eval_pixels, train_pixels
from cwcl_jax.data.options import DataConfig, SpeechInputs
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example
from cwcl_jax.data.text import TextTokenizer, load_tokenizer

Batch = dict[str, Any]
# What each modality needs of a source's example.
FIELDS = {"image": "image", "text": "text", "speech": "audio"}
_STREAMS = {"image": 1, "text": 2, "speech": 3}
_OPTIONS = {"image": "image", "text": "text", "speech": "speech"}


class Processor:
    """Turns examples into the inputs of the given modalities, as the options say."""

    def __init__(self, config: DataConfig, modalities: Sequence[str], embedded: Sequence[str] = ()):
        for modality in modalities:
            if modality not in FIELDS and modality not in embedded:
                raise ValueError(
                    f"The source has no embeddings of the modality {modality!r} (it has "
                    f"{', '.join(embedded) or 'none'}), and raw inputs exist only for "
                    f"{', '.join(FIELDS)}. Add embeds=FOLDER to the source line."
                )
        self.config = config
        self.modalities = tuple(modalities)
        self.raw = tuple(m for m in modalities if m not in embedded)
        self.tokenizer: TextTokenizer | None = None
        if "text" in self.raw:
            self.tokenizer = load_tokenizer(config.text)

    def fields(self) -> set[str]:
        """What must be read of every example."""
        fields = {FIELDS[modality] for modality in self.raw}
        if self.config.labels:
            fields.add("label" if self.config.labels == "class" else "text")
        return fields if len(self.raw) == len(self.modalities) else {*fields, "embeds"}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the arrays, by modality."""
        made: dict[str, Any] = {m: asdict(getattr(self.config, _OPTIONS[m])) for m in self.raw}
        if self.tokenizer is not None:
            made["tokenizer"] = self.tokenizer.fingerprint()
        if self.config.labels:
            made["labels"] = self.config.labels
        return made

    def train_example(
        self, example: Example, *key: int, seconds: float | None = None
    ) -> dict[str, Any]:
        """Inputs of one example by modality; captions stay strings until `tokenize`.

        Random choices follow the integers `key`, those of one modality apart from the others'.
        `seconds` is the length of the batch's waveforms, where it is not the largest.
        """
        inputs: dict[str, Any] = {}
        for modality in self.modalities:
            if modality in self.raw:
                value = _field(example, FIELDS[modality])
                draws = Draws(*key, _STREAMS[modality])
                inputs[modality] = self._train_value(modality, value, draws, seconds)
            else:
                inputs[modality] = {"embeds": _embeds(example, modality)}
        if self.config.labels:
            inputs["label"] = self._label(example, inputs)
        return inputs

    def _label(self, example: Example, inputs: Mapping[str, Any]) -> np.int32:
        """Equal for pairs that the options call alike."""
        if self.config.labels == "class":
            return np.int32(_field(example, "label"))
        text = inputs["text"] if "text" in self.raw else usable_captions(_field(example, "text"))[0]
        return np.int32(zlib.crc32(text.casefold().encode()) & 0x7FFFFFFF)

    def _train_value(self, modality: str, value: Any, draws: Draws, seconds: float | None) -> Any:
        if modality == "image":
            return {"pixels": train_pixels(value, self.config.image, draws)}
        if modality == "speech":
            options = self.config.speech
            return waveform(
                value, replace(options, max_seconds=seconds or options.max_seconds), draws
            )
        return draws.pick(usable_captions(value))

    def eval_example(self, example: Example) -> dict[str, Any]:
        """As `train_example`, without any randomness; the first caption stands for the example."""
        inputs: dict[str, Any] = {}
        for modality in self.modalities:
            if modality not in self.raw:
                inputs[modality] = {"embeds": _embeds(example, modality)}
                continue
            value = _field(example, FIELDS[modality])
            if modality == "image":
                inputs[modality] = {"pixels": eval_pixels(value, self.config.image)}
            elif modality == "speech":
                inputs[modality] = waveform(value, self.config.speech)
            else:
                inputs[modality] = usable_captions(value)[0]
        return inputs

    def tokenize(self, examples: Sequence[dict[str, Any]]) -> None:
        """Replaces the captions of several examples by their tokens, in one call for all."""
        if self.tokenizer is None or not examples:
            return
        made = self.tokenizer([example["text"] for example in examples])
        for row, example in enumerate(examples):
            example["text"] = {name: array[row] for name, array in made.items()}


def collect(examples: Sequence[Any]) -> Any:
    """Dicts of several examples as one, of lists."""
    if isinstance(examples[0], Mapping):
        return {name: collect([example[name] for example in examples]) for name in examples[0]}
    return list(examples)


def join(parts: Sequence[Any]) -> Any:
    """One batch of several parts; wherever these hold lists of arrays, all are copied only once."""
    if isinstance(parts[0], Mapping):
        return {name: join([part[name] for part in parts]) for name in parts[0]}
    if all(isinstance(part, list) for part in parts):
        return np.stack(list(itertools.chain.from_iterable(parts)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shorten(inputs: dict[str, np.ndarray], options: SpeechInputs) -> dict[str, np.ndarray]:
    """Waveforms cut to the shortest of the options' lengths that holds them all."""
    longest = int(inputs["length"].max())
    for seconds in batch_lengths(options.buckets, options.max_seconds):
        samples = round(seconds * options.sample_rate)
        if samples >= longest:
            return inputs | {"waveform": inputs["waveform"][:, :samples]}
    return inputs


def usable_captions(value: str | Sequence[str]) -> list[str]:
    """The captions of an example that hold any text."""
    options = [value] if isinstance(value, str) else value
    usable = [text.strip() for text in options if text and text.strip()]
    if not usable:
        raise BadExample("text empty")
    return usable


def _field(example: Example, name: str) -> Any:
    value = example.get(name)
    if value is None:
        raise BadExample(f"{name} missing", f"the example has {', '.join(example)}")
    return value


def _embeds(example: Example, modality: str) -> np.ndarray:
    vectors = example.get("embeds") or {}
    if modality not in vectors:
        raise BadExample("embeds missing", f"no vector for {modality!r}")
    return vectors[modality]
