"""An analytic encoder and sources in memory: what they score is known beforehand."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.sources import Source
from cwcl_jax.modalities import ImageInputs, SpeechInputs, TextInputs

SIZE = 16
RATE = 16_000
DATA = DataConfig(
    inputs={
        "image": ImageInputs(size=SIZE),
        "text": TextInputs(max_tokens=24),
        "caption": TextInputs(max_tokens=24),
        "speech": SpeechInputs(max_seconds=0.1),
    },
    threads=1,
)


class Memory(Source):
    """Examples by one number each: the grey value of a picture, or the level of a recording."""

    def __init__(
        self,
        values: Sequence[int],
        *,
        modality: str = "image",
        labels: Sequence[int] | None = None,
        texts: Sequence[Any] | None = None,
        class_names: Sequence[str] | None = None,
        samples: Sequence[int] | None = None,
    ):
        self.values, self.labels, self.texts = values, labels, texts
        self.modality, self.class_names, self.samples = modality, class_names, samples

    def __len__(self) -> int:
        return len(self.values)

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        value = self.values[index]
        example: dict[str, Any] = {"id": f"item-{index}"}
        if self.modality == "image" and "image" in fields:
            example["image"] = Image.new("RGB", (SIZE, SIZE), (value, value, value))
        if self.modality == "speech" and "audio" in fields:
            length = self.samples[index] if self.samples else 800
            example["audio"] = (np.full(length, value, np.int16), RATE)
        if self.labels is not None:
            example["label"] = self.labels[index]
        if self.texts is not None and "text" in fields:
            example["text"] = self.texts[index]
        return example

    def fingerprint(self) -> str:
        return "memory"


class Analytic:
    """Items get row `value` of a table, sentences the sum of the vectors of their words."""

    def __init__(self, table: np.ndarray, words: Mapping[str, np.ndarray]):
        self.table = np.asarray(table, np.float32)
        self.shapes: set[tuple] = set()
        self.calls = 0
        tokenizer = DATA.inputs["text"].loaded
        self.words = {}
        for word, vector in words.items():
            tokens = tokenizer([word])
            ids = tokens["tokens"][0][tokens["mask"][0]][1:-1]
            assert len(ids) == 1, f"{word} is not one token"
            self.words[int(ids[0])] = np.asarray(vector, np.float32)

    def __call__(self, modality: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.calls += 1
        self.shapes.add((modality, *(inputs[name].shape for name in sorted(inputs))))
        if modality == "image":
            return self.table[inputs["pixels"][:, 0, 0, 0]]
        if modality == "speech":
            return self.table[inputs["waveform"][:, 0]]
        zero = np.zeros(self.table.shape[1], np.float32)
        rows = inputs["tokens"].tolist()
        return np.stack([sum((self.words.get(t, zero) for t in row), zero) for row in rows])


def give_sources(monkeypatch: Any, **sources: Memory) -> None:
    """Lets source lines `memory:NAME` open these."""

    def open_memory(line: str, *, cache_dir: str = "") -> Memory:
        return sources[line.removeprefix("memory:")]

    monkeypatch.setattr("cwcl_jax.evaluation.runner.open_source", open_memory)
